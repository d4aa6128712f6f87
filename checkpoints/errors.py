"""The one error of this package."""

from __future__ import annotations

_LONGEST = 2000  # characters


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: one sentence with the file, the key or tensor, and the remedy.

    Names and values in it may be a stranger's: what could break the line or steer a terminal is escaped, what is long is cut.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message that may quote a stranger, printable and not too long."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    return message if message.isprintable() else "".join(x if x.isprintable() else ascii(x)[1:-1] for x in message)


def listed(names: list[str], limit: int = 8) -> str:
    """`a, b, c and 12 more`, for sentences that name the culprits."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
