"""From an objective to trained weights: views, the Trainer, checkpoints."""
