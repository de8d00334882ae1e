"""Sharding plans, one file a model family: which layer gets which parallel style, by name."""

from megalm.parallel.styles import Style

Plan = tuple[tuple[str, Style], ...]
"""(pattern, style): patterns match a module's whole name. Each matches something, and no two the same module."""
