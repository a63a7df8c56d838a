"""The one idea: training state as boxes of global tensors, and moving boxes between layouts."""
