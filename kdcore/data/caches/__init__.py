"""What is computed once and read by every later run: the teacher's top classes, hidden states."""
