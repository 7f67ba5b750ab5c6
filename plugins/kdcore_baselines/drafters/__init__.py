"""Drafters that need no training, EAGLE-3 and Medusa."""
