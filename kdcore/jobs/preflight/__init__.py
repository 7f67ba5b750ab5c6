"""Preflight checks: what a job would do and cost, without training."""
