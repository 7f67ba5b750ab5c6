"""Rows that a teacher reads in place of the student's: in its tokens, or with its prompts."""
