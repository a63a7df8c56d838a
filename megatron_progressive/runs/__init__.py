"""The run folder: its format, its one writer, reading it, and what decides a run's numbers."""
