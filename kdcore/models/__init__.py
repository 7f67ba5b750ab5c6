"""Teachers, students and targets: loading, construction, layer cuts, facts, checks of fit."""
