"""Muon, normalised SGD, Newton-Schulz iterations, and learning-rate schedules."""
