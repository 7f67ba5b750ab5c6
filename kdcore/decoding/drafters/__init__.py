"""Shared parts of drafters with weights: module, cache, folder, and layouts of other engines."""
