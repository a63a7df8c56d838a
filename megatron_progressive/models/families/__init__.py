"""One file a family: its parts and presets."""
