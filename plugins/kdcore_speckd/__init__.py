"""Speculative knowledge distillation: a gate on the teacher's tokens."""
