"""Studies: the cells of a grid, running and submitting them, their state and their results."""
