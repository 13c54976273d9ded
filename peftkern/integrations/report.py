"""What quantizing a model did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class QuantizeReport:
    """Which modules were quantized, which were not and why, and how large the model is.

    Attributes:
        format: of the quantized weights, unless it is said that they are in another.
        formats: by name of the modules that were quantized, in the order of the model.
        skipped: the other linear modules, and embeddings that were to be quantized, each with the reason.
        bytes_before: of all parameters and buffers, dense.
        bytes_after: the same, quantized; for quantized modules it counts codes and scales.
    """

    format: str
    formats: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def quantized(self) -> list[str]:
        """Names of the modules that were quantized."""
        return list(self.formats)

    def __str__(self) -> str:
        counts = {self.format: 0} | Counter(self.formats.values())
        lines = [
            f"{', '.join(f'{count} layers in {format}' for format, count in counts.items())}: "
            f"{self.bytes_before / 2**20:.1f} MiB before, {self.bytes_after / 2**20:.1f} MiB after"
        ]
        for reason, count in Counter(self.skipped.values()).items():
            names = [name for name, why in self.skipped.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"  {count} left as they are, {reason}: {shown}")
        return "\n".join(lines)
