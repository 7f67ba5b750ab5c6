"""What this package adds to kdcore."""
