"""Chat templates: rendering within bounds, and the mask of the learned tokens."""
