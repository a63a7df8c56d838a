"""The coordinate check: activations and their updates against width and depth."""
