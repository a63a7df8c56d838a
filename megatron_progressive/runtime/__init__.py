"""Processes and devices: launching, joining, groups, layouts, signals, files, progress."""
