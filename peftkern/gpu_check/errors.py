"""What keeps the check from running."""

from __future__ import annotations


class CheckError(RuntimeError):
    """The check cannot run; the message says why and what would help."""
