"""The layers that drafters are made of, and fast products for a pass on a CPU."""
