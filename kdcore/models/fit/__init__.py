"""Checks that a teacher, a student, a method and the data of a run fit each other."""
