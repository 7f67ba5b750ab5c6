"""Measurements of students and drafters on held-out rows."""
