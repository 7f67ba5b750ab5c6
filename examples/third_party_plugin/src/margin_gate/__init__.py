"""A gate for kdcore that keeps the positions on which the teacher's choice is clear."""
