"""What a policy does, to look at: for every tensor whether it is trained, for how long it was, its worth and its price.

    view = policy.view()
    print(view)                     # tables: layers x kinds of tensors, and the sums of each kind
    view.save("selection.png")      # the heat map; .csv and .json have every tensor's numbers

`view_history` makes one of any list of selections.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkern.select.places import OUTSIDE, Places, find_places
from peftkern.select.savings import Savings, compute_savings, steps_in_force
from peftkern.select.selection import Selection

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 240  # of tables as text: wide enough that no column is cut


@dataclass(frozen=True)
class TensorView:
    """A tensor that can be trained.

    Attributes:
        name: of the parameter.
        layer: as in `peftkern.select.places`; ``""`` for a tensor outside of blocks.
        kind: as ``"q"``, ``"up lora_A"``, ``"input_layernorm"``.
        selected: whether it is trained now.
        share: of the updates since the first selection, those that trained it; 1 or 0 before the first update.
        importance: in the last selection that looked at it; ``None``: none did.
        costs: of its gradient alone, by unit, as the last selection with costs has them.
    """

    name: str
    layer: str
    kind: str
    selected: bool
    share: float
    importance: float | None
    costs: Mapping[str, float]


@dataclass(frozen=True)
class SelectionView:
    """What `view_history` gives. ``str()`` is the tables as text.

    Attributes:
        history: the selections.
        steps_done: updates so far.
        tensors: all candidates.
        places: the layers and kinds that they are of.
        savings: against training all of them.
    """

    history: tuple[Selection, ...]
    steps_done: int
    tensors: tuple[TensorView, ...]
    places: Places
    savings: Savings

    @property
    def now(self) -> Selection:
        """The selection in force."""
        return self.history[-1]

    @property
    def units(self) -> list[str]:
        """Units that costs are known in."""
        return list(dict.fromkeys(unit for tensor in self.tensors for unit in tensor.costs))

    def cells(self) -> dict[tuple[str, str], list[TensorView]]:
        """Tensors by layer and kind; several at one place are experts of a layer."""
        cells: dict[tuple[str, str], list[TensorView]] = {}
        for tensor in self.tensors:
            cells.setdefault((tensor.layer, tensor.kind), []).append(tensor)
        return cells

    def table(self, value: str = "selected") -> Table:
        """A rich table with a row for each layer and a column for each kind of tensor.

        Args:
            value: ``"selected"``: ● for trained now (◐: some experts), and the share of updates that trained it, · for
                none; ``"importance"``; ``"flops"`` or ``"seconds"``: cost of the gradient.

        Raises:
            ValueError: the value is none of these, or costs are not known in this unit.
        """
        from rich.table import Table

        text = self._text_of(value)
        cells = self.cells()
        table = Table(title=f"{value}: layers x kinds of tensors", title_justify="left", header_style="bold")
        table.add_column("layer", justify="right")
        for kind in self.places.kinds:
            table.add_column(kind, justify="right", no_wrap=True)
        for layer in self.places.layers:
            row = [cells.get((layer, kind), []) for kind in self.places.kinds]
            table.add_row(layer, *(text(cell) if cell else "" for cell in row))
        return table

    def kinds_table(self) -> Table:
        """A rich table of sums over layers, for each kind of tensor, those outside of blocks included."""
        from rich.table import Table

        table = Table(title="kinds of tensors, over all layers", title_justify="left", header_style="bold")
        table.add_column("kind")
        for header in ("trained now", "of the time", "of the importance", *(f"of the {u}" for u in self.units)):
            table.add_column(header, justify="right")
        for kind, tensors in self._by_kind():
            trained = f"{sum(t.selected for t in tensors)} of {len(tensors)}"
            time = f"{sum(t.share for t in tensors) / len(tensors):.0%}"
            costs = (_part(_cost(tensors, unit), _cost(self.tensors, unit)) for unit in self.units)
            table.add_row(kind, trained, time, _part(_positive(tensors), _positive(self.tensors)), *costs)
        return table

    def _by_kind(self) -> Iterator[tuple[str, list[TensorView]]]:
        for kind in self.places.kinds:
            yield kind, [t for t in self.tensors if t.layer != OUTSIDE and t.kind == kind]
        for kind in self.places.outside:
            yield f"{kind} (no layer)", [t for t in self.tensors if t.layer == OUTSIDE and t.kind == kind]

    def _text_of(self, value: str) -> Callable[[Sequence[TensorView]], str]:
        texts = {"selected": _selected_text, "importance": _importance_text}
        texts |= {unit: partial(_cost_text, unit) for unit in self.units}
        if value not in texts:
            raise ValueError(f"SelectionView: value must be one of {list(texts)}, got {value!r}")
        return texts[value]

    def __str__(self) -> str:
        tables = [self.table()] if self.places.layers else []
        text = _render(*tables, self.kinds_table())
        return f"{self.now}\n{text}{self.savings}"

    def save(self, path: str | Path) -> None:
        """Write ``.png`` (the heat map), ``.csv`` (a line for each tensor) or ``.json`` (those, selections, savings).

        Raises:
            ValueError: the file name has another ending.
            OSError: it cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() not in _WRITERS:
            raise ValueError(f"SelectionView.save: path must end in {', '.join(_WRITERS)}, got {str(path)!r}")
        _WRITERS[target.suffix.lower()](self, target)

    def summary(self) -> dict[str, Any]:
        """The selection in force and the savings, without the tensors, for a JSON file."""
        now = _selection_data(self.now)
        del now["names"]
        counts = {"trained": len(self.now.names), "candidates": len(self.tensors), "selections": len(self.history)}
        return _finite({"policy": self.now.policy, **counts, **now, "savings": self.savings.as_data()})  # type: ignore[no-any-return]

    def as_data(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "policy": self.now.policy,
            "steps": self.steps_done,
            "savings": self.savings.as_data(),
            "selections": [_selection_data(selection) for selection in self.history],
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def view_history(
    history: Sequence[Selection],
    steps_done: int | None = None,
    passes: int = 1,
    watts: Any = None,
    grams_per_kwh: float | None = None,
) -> SelectionView:
    """What the selections in ``history`` come to.

    Args:
        history: `Policy.history`: at least one selection.
        steps_done: updates so far; ``None``: as many as when the last selection was made.
        passes, watts, grams_per_kwh: as in `peftkern.select.compute_savings`.

    Raises:
        ValueError: ``history`` is empty or out of order, or an argument is one that `compute_savings` refuses.
    """
    if not history:
        raise ValueError("view_history: history is empty; the policy selects before its first update")
    steps = history[-1].step if steps_done is None else steps_done
    counts = steps_in_force(history, steps)
    names = list(dict.fromkeys(name for selection in history for name in selection.candidates))
    places = find_places(names)
    facts = _Facts(history, counts)
    tensors = tuple(TensorView(name, places.of[name].layer, places.of[name].kind, *facts.of(name)) for name in names)
    saved = compute_savings(history, steps, passes, watts, grams_per_kwh)
    return SelectionView(tuple(history), steps, tensors, places, saved)


class _Facts:
    """What a history says of a tensor; in sums over it that are made once."""

    def __init__(self, history: Sequence[Selection], counts: Sequence[int]) -> None:
        self._now = set(history[-1].names)
        self._trained: dict[str, int] = {}
        self._importance: dict[str, float] = {}
        self._total = sum(counts)
        for selection, count in zip(history, counts, strict=True):
            self._importance |= selection.importances
            for name in selection.names:
                self._trained[name] = self._trained.get(name, 0) + count
        self._graphs = {unit: graph for selection in history for unit, graph in selection.costs.items()}

    def of(self, name: str) -> tuple[bool, float, float | None, dict[str, float]]:
        selected = name in self._now
        share = self._trained.get(name, 0) / self._total if self._total else float(selected)
        costs = {unit: graph.by_name[name].cost for unit, graph in self._graphs.items() if name in graph.by_name}
        return selected, share, self._importance.get(name), costs


# ---- numbers of several tensors, as text


def _cost(tensors: Sequence[TensorView], unit: str) -> float:
    return sum(tensor.costs.get(unit, 0.0) for tensor in tensors)


def _positive(tensors: Sequence[TensorView]) -> float:
    return sum(tensor.importance for tensor in tensors if tensor.importance is not None and tensor.importance > 0)


def _part(value: float, total: float) -> str:
    return f"{value / total:.1%}" if total > 0 and math.isfinite(total) else ""


def _selected_text(tensors: Sequence[TensorView]) -> str:
    share = sum(tensor.share for tensor in tensors) / len(tensors)
    on = sum(tensor.selected for tensor in tensors)
    mark = "" if not on else "● " if on == len(tensors) else "◐ "
    return f"{mark}{share:.0%}" if share or on else "·"


def _importance_text(tensors: Sequence[TensorView]) -> str:
    known = [tensor.importance for tensor in tensors if tensor.importance is not None]
    return f"{sum(known):.2g}" if known else ""


def _cost_text(unit: str, tensors: Sequence[TensorView]) -> str:
    return f"{_cost(tensors, unit):.2g}"


def _render(*tables: Table) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=_WIDTH)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# ---- files


def _selection_data(selection: Selection) -> dict[str, Any]:
    shares = {unit: selection.share(unit) for unit in selection.costs}
    facts = {"step": selection.step, "shares": shares, "importance_share": selection.importance_share}
    return {**facts, "names": list(selection.names)}


def _finite(value: Any) -> Any:
    """``value`` with infinite numbers and NaN as text: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(shown: SelectionView, path: Path) -> None:
    text = json.dumps(_finite(shown.as_data()), indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _write_csv(shown: SelectionView, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "layer", "kind", "selected", "share", "importance", *shown.units])
        for t in shown.tensors:
            costs = [t.costs.get(unit, "") for unit in shown.units]
            importance = "" if t.importance is None else t.importance
            writer.writerow([t.name, t.layer, t.kind, int(t.selected), t.share, importance, *costs])


def _write_png(shown: SelectionView, path: Path) -> None:
    from peftkern.select.heat_map import draw

    draw(shown, path)


_WRITERS: Mapping[str, Callable[[SelectionView, Path], None]] = {
    ".png": _write_png,
    ".csv": _write_csv,
    ".json": _write_json,
}
