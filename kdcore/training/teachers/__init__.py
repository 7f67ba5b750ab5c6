"""What teaches a student: one or several models, wherever their logits come from."""
