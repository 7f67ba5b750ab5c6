"""`kdcore cache`: building caches in parts, and merging them."""
