"""Images: their data sources, and their tensors."""
