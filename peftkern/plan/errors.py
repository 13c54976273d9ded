"""What `peftkern.plan` raises."""

from __future__ import annotations


class PlanError(ValueError):
    """An argument does not fit, or nothing fits into the budget; the message says what would."""
