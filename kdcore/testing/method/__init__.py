"""The suites of the parts of a loss, and their batches."""
