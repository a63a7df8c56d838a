"""The model families: one file has the parts and the presets of one family."""
