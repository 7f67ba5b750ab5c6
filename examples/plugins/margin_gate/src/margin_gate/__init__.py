"""Gate for kdcore that keeps the positions with a clear choice of the teacher."""
