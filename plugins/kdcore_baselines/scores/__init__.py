"""Scores of answers: of texts, numbers, mathematics and programs, and by a judge."""
