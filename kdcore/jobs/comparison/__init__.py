"""`kdcore compare`: the cells, their processes, the table."""
