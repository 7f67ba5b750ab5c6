"""The Trainer of kdcore, and what it keeps: checkpoints, the best model, figures."""
