"""The one exception for a request that cannot be met."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot run: one line for the user, exit code 2."""
