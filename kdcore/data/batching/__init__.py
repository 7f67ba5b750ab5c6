"""How rows come together in batches: packed into sequences, grouped by lengths, or augmented."""
