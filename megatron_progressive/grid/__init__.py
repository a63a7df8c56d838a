"""Studies: the cells of a grid, how they are run and submitted, their state and their results."""
