"""What `patch` did: one row per module, printable in groups and as data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peftkern.patch.layer_plan import in_words
from peftkern.patch.table import format_table, pattern_of

_INLINE = 50
"""Characters of a remark that still stand in the table; longer ones become footnotes."""


@dataclass(frozen=True)
class PatchRow:
    """One module.

    Attributes:
        module: its name in the model.
        kind: its class, for example ``"lora.bnb.Linear4bit"``.
        weight: format and shape of its frozen weight, for example ``"nf4 576×1536"``; empty when it has none.
        action: ``"fused"``, or ``"left"`` on the code that it had.
        kernel: operation and backend that run it, for example ``"lora_linear on cpu"``, and how many layers that share
            their input run as one, for example ``"lora_linear on triton (group of 3)"``; empty when left.
        reason: why it was left; for a fused module, what is worth knowing about it.
        wanted: whether ``strict=True`` minds that it was left.
        calls_left: calls since it was patched that the fused path did not take, by reason.
        unused: outputs that the layers which share its input computed for it and nobody asked for. Once that happens
            in a block, its layers run one by one.
        entries: of the sparse deltas that act in it now.
        density: their share of the entries of the weight.
    """

    module: str
    kind: str
    weight: str
    action: Literal["fused", "left"]
    kernel: str = ""
    reason: str = ""
    wanted: bool = False
    calls_left: Mapping[str, int] = field(default_factory=dict)
    unused: int = 0
    entries: int = 0
    density: float = 0.0


@dataclass(frozen=True)
class PatchReport:
    """All modules that carry a frozen or adapted linear weight, or an adapter of any kind, gated blocks, norms.

    The base layer inside an adapter layer has a row of its own only when the adapter layer was left.

    Attributes:
        rows: one for each.
        layers: what each decoder layer keeps, in the words of a plan; empty without one.
    """

    rows: tuple[PatchRow, ...]
    layers: tuple[str, ...] = ()

    @property
    def fused(self) -> tuple[PatchRow, ...]:
        """Rows of the modules that run on fused kernels."""
        return tuple(row for row in self.rows if row.action == "fused")

    @property
    def left(self) -> tuple[PatchRow, ...]:
        """Rows of the modules that were left alone."""
        return tuple(row for row in self.rows if row.action == "left")

    @property
    def counts(self) -> dict[str, int]:
        """How many modules are fused, and how many left."""
        return {"fused": len(self.fused), "left": len(self.left)}

    @property
    def reasons(self) -> dict[str, int]:
        """How many modules were left, by reason."""
        return dict(Counter(row.reason for row in self.left))

    def to_dict(self) -> dict[str, Any]:
        """The report as data that `json.dumps` takes."""
        rows = [{**asdict(row), "calls_left": dict(row.calls_left)} for row in self.rows]
        return {"counts": self.counts, "reasons": self.reasons, "layers": list(self.layers), "rows": rows}

    def __str__(self) -> str:
        summary = f"{len(self.fused)} modules fused, {len(self.left)} left alone"
        if not self.rows:
            return f"{summary}: the model has no linear or adapter layers"
        plan = f"\n{in_words(self.layers)}" if self.layers else ""
        return f"{_format_rows(self.rows)}\n{summary}{plan}"


def _format_rows(rows: tuple[PatchRow, ...]) -> str:
    groups: defaultdict[tuple[str, ...], list[PatchRow]] = defaultdict(list)
    for row in rows:
        groups[pattern_of(row.module), row.kind, row.weight, row.action, row.kernel, row.reason].append(row)
    footnotes: dict[str, str] = {}
    lines = [_format_group(members, footnotes) for members in groups.values()]
    table = format_table(("module", "count", "class", "weight", "kernel", "remark"), lines)
    return "\n".join([table, *(f"{mark} {text}" for text, mark in footnotes.items())])


def _format_group(rows: list[PatchRow], footnotes: dict[str, str]) -> tuple[str, ...]:
    first = rows[0]
    name = first.module if len(rows) == 1 else pattern_of(first.module)
    calls: Counter[str] = Counter()
    for row in rows:
        calls.update(row.calls_left)
    entries, density = sum(row.entries for row in rows), sum(row.density for row in rows) / len(rows)
    remarks = [f"{entries} sparse entries, {density:.3g} of them all"] if entries else []
    remarks += [_short(first.reason, footnotes)] if first.reason else []
    remarks += [f"{count} calls left: {_short(why, footnotes)}" for why, count in calls.items()]
    unused = sum(row.unused for row in rows)
    remarks += [f"outputs unused: {unused}, runs alone"] if unused else []
    kernel = first.kernel if first.action == "fused" else "(left)"
    return name, str(len(rows)), first.kind, first.weight, kernel, ", ".join(remarks)


def _short(remark: str, footnotes: dict[str, str]) -> str:
    return remark if len(remark) <= _INLINE else footnotes.setdefault(remark, f"[{len(footnotes) + 1}]")
