"""How rows come together in batches: packed into sequences, or grouped by their lengths."""
