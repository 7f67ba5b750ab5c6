"""Responses that a teacher or the student generates: into a file, over an endpoint, on policy."""
