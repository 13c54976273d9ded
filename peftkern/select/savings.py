"""What a policy has saved so far, against training all of its candidates.

    saved  = Σ over updates of passes · (full - step(names in force))        FLOPs, or seconds
    energy = saved seconds · watts / 3600                                    watt hours
    CO2    = energy / 1000 · grams per kWh                                   grams

``full`` and ``step`` are those of `peftkern.select.CostGraph`: predictions for the batch that it was recorded on,
without the time that selecting takes. The power is the user's figure, or what ``codecarbon`` measured; there is no
default for it, and none for the grams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from peftkern.select.cost_graph import UNITS
from peftkern.select.selection import Selection

_SECONDS_PER_HOUR = 3600.0
_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Saved:
    """Costs of the updates in one unit.

    Attributes:
        unit: ``"flops"`` or ``"seconds"``.
        full: of training all candidates.
        spent: of what was trained.
        steps: updates that this counts: those under a selection with costs in this unit.
    """

    unit: str
    full: float
    spent: float
    steps: int

    @property
    def amount(self) -> float:
        """``full - spent``."""
        return self.full - self.spent

    @property
    def share(self) -> float:
        """``amount`` as a share of ``full``; 0 where nothing costs anything."""
        return self.amount / self.full if self.full else 0.0


@dataclass(frozen=True)
class Savings:
    """What was saved. ``str()`` has a line for each figure, with its formula.

    Attributes:
        steps: updates since the first selection.
        units: by unit, those in which costs are known.
        watts: that were stated or measured; ``None``: no energy is given.
        grams_per_kwh: of CO2, that were stated; ``None``: no CO2 is given.
        power_source: where ``watts`` is from, for people.
    """

    steps: int
    units: Mapping[str, Saved] = field(default_factory=dict)
    watts: float | None = None
    grams_per_kwh: float | None = None
    power_source: str = "as stated"

    @property
    def watt_hours(self) -> float | None:
        """Energy; ``None`` without seconds or watts."""
        if self.watts is None or "seconds" not in self.units:
            return None
        return self.units["seconds"].amount * self.watts / _SECONDS_PER_HOUR

    @property
    def grams(self) -> float | None:
        """CO2; ``None`` without energy or grams per kWh."""
        energy = self.watt_hours
        return None if energy is None or self.grams_per_kwh is None else energy / 1000 * self.grams_per_kwh

    def lines(self) -> list[str]:
        """One line for each figure."""
        lines = [self._cost_line(saved) for saved in self.units.values()]
        if self.watt_hours is not None:
            seconds = self.units["seconds"].amount
            formula = f"{seconds:.4g} s × {self.watts:g} W ({self.power_source}) / 3600"
            lines.append(f"saved {self.watt_hours:.4g} Wh = {formula}")
        if self.grams is not None:
            formula = f"{self.watt_hours:.4g} Wh / 1000 × {self.grams_per_kwh:g} g/kWh (as stated)"
            lines.append(f"saved {self.grams:.4g} g of CO2 = {formula}")
        return lines or ["saved nothing that is known: the selections came without costs"]

    def as_data(self) -> dict[str, Any]:
        """For a JSON file."""
        units = {
            name: {"full": s.full, "spent": s.spent, "saved": s.amount, "share": s.share, "steps": s.steps}
            for name, s in self.units.items()
        }
        energy = {"watts": self.watts, "grams_per_kwh": self.grams_per_kwh, "watt_hours": self.watt_hours}
        return {"steps": self.steps, **units, **energy, "grams": self.grams, "formulas": self.lines()}

    def _cost_line(self, saved: Saved) -> str:
        name = {"flops": "FLOPs", "seconds": "s"}[saved.unit]
        updates = f"{saved.steps} updates" if saved.steps == self.steps else f"{saved.steps} of {self.steps} updates"
        return (
            f"saved {saved.amount:.4g} {name} = {saved.full:.4g} for training everything - {saved.spent:.4g}, "
            f"predicted over {updates}: {saved.share:.1%}"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())


def steps_in_force(history: Sequence[Selection], steps_done: int) -> list[int]:
    """For how many updates each selection was what was trained.

    Args:
        history: selections in the order in which they were made.
        steps_done: updates so far.

    Raises:
        ValueError: a selection is of a later update than the next one, or than ``steps_done``.
    """
    ends = [*(selection.step for selection in history[1:]), steps_done]
    counts = [end - selection.step for selection, end in zip(history, ends, strict=True)] if history else []
    if any(count < 0 for count in counts):
        steps = [selection.step for selection in history]
        raise ValueError(
            f"compute_savings: history must be in order and not later than steps_done={steps_done}, got {steps}"
        )
    return counts


def compute_savings(
    history: Sequence[Selection],
    steps_done: int,
    passes: int = 1,
    watts: float | PowerMeter | None = None,
    grams_per_kwh: float | None = None,
) -> Savings:
    """What the selections in ``history`` have saved until now.

    Args:
        history: `Policy.history`.
        steps_done: updates so far.
        passes: forward and backward passes in one update (gradient accumulation). In seconds, what the update itself
            takes counts with each of them.
        watts: power of the machine while it trains, or a `PowerMeter` that measured it; for the energy.
        grams_per_kwh: of CO2, of the electricity used; for the CO2, which needs ``watts`` as well.

    Raises:
        ValueError: ``history`` is out of order, or a number is negative, not finite, or of no use without ``watts``.
    """
    measured = isinstance(watts, PowerMeter)
    power = watts.watts if isinstance(watts, PowerMeter) else watts
    _check_energy(passes, power, grams_per_kwh)
    counts = steps_in_force(history, steps_done)
    units = {}
    for unit in UNITS:
        known = [
            (selection, count) for selection, count in zip(history, counts, strict=True) if unit in selection.costs
        ]
        if known:
            full = passes * sum(count * selection.costs[unit].full for selection, count in known)
            spent = passes * sum(count * selection.step_costs[unit] for selection, count in known)
            units[unit] = Saved(unit, full, spent, sum(count for _, count in known))
    source = "mean, by codecarbon" if measured else "as stated"
    return Savings(sum(counts), units, power, grams_per_kwh, source)


def _check_energy(passes: int, watts: float | None, grams_per_kwh: float | None) -> None:
    if passes < 1:
        raise ValueError(f"compute_savings: passes must be at least 1, got {passes}")
    for name, value in (("watts", watts), ("grams_per_kwh", grams_per_kwh)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"compute_savings: {name} must be finite and at least 0, got {value}")
    if grams_per_kwh is not None and watts is None:
        raise ValueError("compute_savings: grams_per_kwh needs watts as well; the CO2 is that of the energy")


def selection_logs(history: Sequence[Selection], steps_done: int, passes: int = 1) -> dict[str, float]:
    """The selection in force and what was saved, as numbers for a log. Empty before the first selection.

    Returns:
        ``select/trained_tensors``; ``select/flops_share`` and ``select/seconds_share``, of a step in the full one;
        ``select/importance_share``; ``select/saved_flops`` and ``select/saved_seconds``: those that are known and
        finite.
    """
    if not history:
        return {}
    now = history[-1]
    logs = {"select/trained_tensors": float(len(now.names))}
    logs |= {f"select/{unit}_share": now.share(unit) for unit in now.costs}
    if now.importance_share is not None:
        logs["select/importance_share"] = now.importance_share
    saved = compute_savings(history, steps_done, passes).units
    logs |= {f"select/saved_{unit}": entry.amount for unit, entry in saved.items()}
    return {name: value for name, value in logs.items() if math.isfinite(value)}


class PowerMeter:
    """The mean power of the machine while in its context, as ``codecarbon`` measures or estimates it.

    Attributes:
        watts: energy / duration. Set when the context ends.

    Raises:
        ImportError: ``codecarbon`` is not installed.

    Source: codecarbon's documentation. Without access to counters of energy it estimates, from the CPU's rated power.
    """

    def __init__(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError as error:
            raise ImportError("PowerMeter: needs codecarbon; pip install codecarbon, or give watts=") from error
        # the country decides codecarbon's CO2, which is not used, and without it codecarbon asks the network
        self._tracker: Any = OfflineEmissionsTracker(country_iso_code="FRA", save_to_file=False, log_level="error")
        self._watts: float | None = None

    @property
    def watts(self) -> float:
        """Mean power.

        Raises:
            RuntimeError: the context has not ended.
        """
        if self._watts is None:
            raise RuntimeError("PowerMeter: watts are known when its context has ended")
        return self._watts

    def __enter__(self) -> PowerMeter:
        self._tracker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.stop()
        measured = self._tracker.final_emissions_data
        self._watts = float(measured.energy_consumed * _JOULES_PER_KWH / measured.duration)
