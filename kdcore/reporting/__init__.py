"""Finished and half-finished runs as one HTML page that opens from disk."""
