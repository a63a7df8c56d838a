"""Depth expansion: the map from source to target layers, the hook at τ, and the expansion of a
checkpoint on disk."""
