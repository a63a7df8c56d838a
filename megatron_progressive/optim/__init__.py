"""Muon, normalised SGD, Newton-Schulz, learning-rate schedules."""
