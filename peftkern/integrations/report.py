"""What quantizing a model did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class QuantizeReport:
    """Which modules were quantized, which were not and why, and how large the model is.

    Attributes:
        format: of the quantized weights.
        quantized: names of the modules that were quantized.
        skipped: the other linear modules, each with the reason.
        bytes_before: of all parameters and buffers, dense.
        bytes_after: the same, quantized; for the modules in ``quantized`` it counts codes and scales.
    """

    format: str
    quantized: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} linear layers in {self.format}: "
            f"{self.bytes_before / 2**20:.1f} MiB before, {self.bytes_after / 2**20:.1f} MiB after"
        ]
        for reason, count in Counter(self.skipped.values()).items():
            names = [name for name, why in self.skipped.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"  {count} left as they are, {reason}: {shown}")
        return "\n".join(lines)
