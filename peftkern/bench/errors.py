"""What can go wrong in a benchmark."""

from __future__ import annotations


class BenchError(RuntimeError):
    """A benchmark cannot run; the message says why and what would help."""


class DisagreementError(BenchError):
    """Our result and the peer's differ by more than the precision allows, so there is nothing to time."""
