"""Layers of drafters, and attention over draft trees."""
