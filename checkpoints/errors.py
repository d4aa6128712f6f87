"""The one error of this package."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: one sentence with the file, the key or tensor, and the remedy."""


def listed(names: list[str], limit: int = 8) -> str:
    """`a, b, c and 12 more`, for sentences that name the culprits."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
