"""Runs beside their controls: whose control a run is, mixing, verdicts, figures, the pilot."""
