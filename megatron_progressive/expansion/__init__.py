"""Depth expansion: the map from source to target layers, the hook at τ, and the same on disk."""
