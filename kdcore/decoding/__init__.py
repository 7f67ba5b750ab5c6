"""Speculative decoding: a target's session, draft trees, and the loop that joins them."""
