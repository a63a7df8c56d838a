"""Runs beside their controls: which run is whose control, mixing, verdicts, figures, and the
pilot."""
