"""Rows that a teacher reads in place of the student's: in its own tokens, or with its own prompts."""
