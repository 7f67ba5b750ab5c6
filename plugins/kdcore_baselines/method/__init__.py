"""Methods that others are compared with: gates, splitters, divergences, advantages, momentum."""
