"""SpecKD: a gate for speculative knowledge distillation."""
