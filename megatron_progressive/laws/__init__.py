"""Scaling laws: fits with intervals, and what they say of one arm against another."""
