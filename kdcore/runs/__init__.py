"""The run folder: its files, its inputs, its hooks, its costs."""
