"""Teachers, students and targets: loaded, made, cut, described and held against one another."""
