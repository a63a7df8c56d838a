"""Hugging Face's model folders from and to checkpoints, on disk, one tensor at a time."""
