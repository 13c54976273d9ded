"""What was saved, against sums by hand, and energy only as stated."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.savings import PowerMeter, Savings, compute_savings, selection_logs
from peftkern.select.selection import Selection

# forward 10; a costs 4, b costs 6 and needs the segment of 5: full 25, a alone 14, b alone 21
SEGMENTS, TENSORS = (Segment(5.0),), (TensorCost("a", 4.0), TensorCost("b", 6.0, (0,)))
FLOPS, SECONDS = (CostGraph(unit, 10.0, SEGMENTS, TENSORS) for unit in ("flops", "seconds"))


def selection(step: int, *names: str, **facts: Any) -> Selection:
    return Selection("Mine", names, ("a", "b"), step, **{"costs": {"flops": FLOPS, "seconds": SECONDS}, **facts})


HISTORY = [selection(0, "a"), selection(10, "b"), selection(30, "a", "b")]


def test_savings_are_summed_over_the_updates_of_each_selection() -> None:
    saved = compute_savings(HISTORY, 35).units["flops"]
    assert saved.amount == 10 * (25 - 14) + 20 * (25 - 21) + 5 * 0
    assert (saved.full, saved.steps) == (35 * 25, 35)
    assert saved.share == 190 / 875


def test_updates_before_the_first_selection_do_not_count() -> None:
    result = compute_savings([selection(7, "a")], 10)
    assert (result.steps, result.units["seconds"].amount) == (3, 33)


def test_every_pass_of_an_update_counts() -> None:
    assert compute_savings(HISTORY, 35, passes=4).units["flops"].amount == 4 * 190


def test_each_unit_counts_the_updates_that_have_costs_in_it() -> None:
    history = [selection(0, "a", costs={}), selection(10, "a", costs={"flops": FLOPS})]
    result = compute_savings(history, 12)
    assert result.units.keys() == {"flops"}
    assert (result.units["flops"].amount, result.units["flops"].steps) == (22, 2)
    assert "2 of 12 updates" in str(result)


def test_without_costs_nothing_is_said_to_be_saved() -> None:
    result = compute_savings([selection(0, "a", costs={})], 5, watts=50)
    assert (result.units, result.watt_hours) == ({}, None)
    assert str(result) == "saved nothing that is known: the selections came without costs"


def test_a_history_out_of_order_is_refused() -> None:
    for history, steps in ((HISTORY[::-1], 35), (HISTORY, 29)):
        with pytest.raises(ValueError, match="in order and not later than steps_done"):
            compute_savings(history, steps)


# ---- energy


def test_energy_is_seconds_times_watts_and_says_so() -> None:
    result = compute_savings(HISTORY, 35, watts=72.0, grams_per_kwh=500.0)
    assert result.watt_hours == 190 * 72 / 3600
    assert result.grams == 190 * 72 / 3600 / 1000 * 500
    energy, carbon = result.lines()[2:]
    assert energy == "saved 3.8 Wh = 190 s × 72 W (as stated) / 3600"
    assert carbon == "saved 1.9 g of CO2 = 3.8 Wh / 1000 × 500 g/kWh (as stated)"


def test_no_energy_without_watts_and_no_carbon_without_grams() -> None:
    assert compute_savings(HISTORY, 35).watt_hours is None
    assert compute_savings(HISTORY, 35, watts=72.0).grams is None
    assert not [line for line in compute_savings(HISTORY, 35).lines() if "Wh" in line or "CO2" in line]
    flops_only = compute_savings([selection(0, "a", costs={"flops": FLOPS})], 5, watts=72.0)
    assert flops_only.watt_hours is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"watts": -1.0}, "watts must be finite and at least 0, got -1"),
        ({"watts": float("nan")}, "watts must be finite"),
        ({"watts": 1.0, "grams_per_kwh": float("inf")}, "grams_per_kwh must be finite"),
        ({"grams_per_kwh": 100.0}, "grams_per_kwh needs watts"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_savings(HISTORY, 35, **arguments)


def test_codecarbon_gives_the_mean_power(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        def __init__(self, **_options: Any) -> None:
            self.calls: list[str] = []

        def start(self) -> None:
            self.calls.append("start")

        def stop(self) -> None:
            assert self.calls == ["start"]
            self.final_emissions_data = SimpleNamespace(energy_consumed=0.002, duration=100.0)  # kWh, seconds

    module = ModuleType("codecarbon")
    module.OfflineEmissionsTracker = Tracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    meter = PowerMeter()
    with pytest.raises(RuntimeError, match="when its context has ended"):
        compute_savings(HISTORY, 35, watts=meter)
    with meter:
        pass
    assert meter.watts == pytest.approx(72.0)
    assert "190 s × 72 W (mean, by codecarbon) / 3600" in str(compute_savings(HISTORY, 35, watts=meter))


def test_without_codecarbon_the_meter_says_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ImportError, match="pip install codecarbon, or give watts="):
        PowerMeter()


# ---- logs


def test_logs_have_the_selection_in_force_and_the_savings() -> None:
    history = [*HISTORY[:1], selection(10, "b", importances={"a": 1.0, "b": 3.0})]
    assert selection_logs(history, 12) == {
        "select/trained_tensors": 1.0,
        "select/flops_share": 21 / 25,
        "select/seconds_share": 21 / 25,
        "select/importance_share": 0.75,
        "select/saved_flops": 10 * 11 + 2 * 4,
        "select/saved_seconds": 10 * 11 + 2 * 4,
    }


def test_logs_hold_what_is_known_and_finite() -> None:
    assert selection_logs([], 0) == {}
    endless = {"a": float("inf"), "b": float("inf")}
    logs = selection_logs([selection(0, "a", costs={}, importances=endless)], 3)
    assert logs == {"select/trained_tensors": 1.0}


def test_nothing_saved_is_no_share() -> None:
    assert Savings(0).lines() == ["saved nothing that is known: the selections came without costs"]
    assert compute_savings([selection(0, "a")], 0).units["flops"].share == 0.0
