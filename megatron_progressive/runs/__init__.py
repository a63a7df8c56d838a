"""The run folder: its format, its one writer, its readers, and what decides a run's numbers."""
