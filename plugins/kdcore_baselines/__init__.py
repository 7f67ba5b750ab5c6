"""Baselines: the methods that other methods are compared with."""
