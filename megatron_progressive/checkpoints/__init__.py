"""Checkpoints on disk: saving, loading and inspecting boxes of global tensors, in any layout."""
