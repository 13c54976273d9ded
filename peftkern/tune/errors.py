"""What can go wrong in a measurement on a GPU."""

from __future__ import annotations


class TuneError(RuntimeError):
    """Nothing can be measured; the message says why and what would help."""
