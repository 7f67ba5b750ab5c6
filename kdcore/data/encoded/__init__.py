"""Encoded rows on disk: written once, in parallel, and found again by their fingerprint."""
