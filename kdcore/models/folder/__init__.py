"""A model's folder: its files, weights and template, and the config of a new model."""
