"""Starter specs, and how one is made for somebody's own data."""
