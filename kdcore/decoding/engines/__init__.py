"""Engines: what runs a target's passes over draft trees, and the one of torch."""
