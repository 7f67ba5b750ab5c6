"""Distil language models and train speculative drafters from small, pluggable parts."""
