"""What was timed: one row per kernel or operation, with the figures that follow from its time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftkern.backends.triton.devices import Rates
from peftkern.backends.triton.roofline import Arithmetic


@dataclass(frozen=True)
class Row:
    """One kernel or operation, at one shape and number of tokens.

    Attributes:
        kernel: its name; for an operation also its weights and its path.
        shape: of the weight, or of the group's weights.
        tokens: rows of x; ``None`` where there is no x.
        seconds: median time of one call.
        moved: bytes that it has to read and write, each once.
        flops: floating-point operations.
        arithmetic: which of the device's rates limits these.
        peers: seconds that others take for the same, by name.
        error: worst relative error against float64, or share of bytes that differ; ``None`` where nothing was compared.
        limit: greatest admissible error.
    """

    kernel: str
    shape: str
    tokens: int | None
    seconds: float
    moved: int
    flops: int
    arithmetic: Arithmetic = "half"
    peers: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    limit: float | None = None

    @property
    def right(self) -> bool:
        """Whether the error is admissible; NaN is not."""
        return self.error is None or self.limit is None or self.error <= self.limit

    def roofline_fraction(self, rates: Rates) -> float:
        """The least time that the device's rates allow, as a part of the time that it took."""
        rate = {"half": rates.half, "tf32": rates.tf32, "single": rates.single}[self.arithmetic]
        return max(self.moved / rates.bandwidth, self.flops / rate) / self.seconds

    def as_data(self, rates: Rates) -> dict[str, Any]:
        """The row as JSON holds it."""
        return {
            "kernel": self.kernel,
            "shape": self.shape,
            "tokens": self.tokens,
            "us": self.seconds * 1e6,
            "tb_per_s": self.moved / self.seconds / 1e12,
            "tflop_per_s": self.flops / self.seconds / 1e12,
            "roofline_fraction": self.roofline_fraction(rates),
            "peers": {name: {"us": value * 1e6, "ratio": value / self.seconds} for name, value in self.peers.items()},
            "error": None if self.error is None else str(self.error) if math.isinf(self.error) else self.error,
            "limit": self.limit,
            "right": self.right,
        }
