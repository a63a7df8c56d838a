"""The one exception for what a user asked for and cannot have."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot run: one line for the user, exit code 2."""
