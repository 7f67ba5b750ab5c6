"""Layers of drafters, and fast matrix products for CPU passes."""
