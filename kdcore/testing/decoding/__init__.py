"""The suites of the parts of speculative decoding, and their tiny target."""
