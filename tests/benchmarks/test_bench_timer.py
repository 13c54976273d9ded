"""The interleaved timer: the order of calls, the number of pairs, and what it leaves behind. No timings."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from fake_cases import QUICK, agree, disagree

from peftkern.bench import Case, DisagreementError, Effort, Quantity, measure
from peftkern.bench import case as case_module


def recording_case(calls: list[str], **changes: object) -> Case:
    case = Case(
        "recorded",
        ours=lambda: calls.append("ours"),
        peer=lambda: calls.append("peer"),
        check=lambda: calls.append("check"),
        effort=Effort(minimum_pairs=3, maximum_pairs=3, seconds=0.0),
    )
    return replace(case, **changes)  # type: ignore[arg-type]


def test_checks_then_warms_up_then_alternates() -> None:
    calls: list[str] = []
    measurement = measure(recording_case(calls))
    assert calls == ["check", "peer", "ours", *["peer", "ours"] * 3]
    assert len(measurement.ours) == len(measurement.peer) == 3
    assert measurement.quantity is Quantity.TIME


def test_nothing_runs_when_the_results_disagree() -> None:
    calls: list[str] = []
    with pytest.raises(DisagreementError, match="dX"):
        measure(recording_case(calls, check=disagree))
    assert calls == []


def test_unit_scales_the_samples_and_must_be_one_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_module, "seconds_of", lambda function: 0.5 if function is int else 2.0)
    case = Case("c", ours=int, peer=float, check=agree, unit="ms", effort=QUICK)
    measurement = measure(case)
    assert list(measurement.ours) == [500.0, 500.0]
    assert list(measurement.peer) == [2000.0, 2000.0]
    with pytest.raises(ValueError, match="unit must be one of"):
        measure(replace(case, unit="MB"))


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        (Effort(minimum_pairs=4, maximum_pairs=9, seconds=0.0), 4),
        (Effort(minimum_pairs=2, maximum_pairs=9, seconds=1e9), 9),
    ],
)
def test_pairs_stay_within_the_bounds(effort: Effort, expected: int) -> None:
    measurement = measure(Case("c", ours=int, peer=int, check=agree, effort=effort))
    assert len(measurement.ours) == expected


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 5), (6, 5)])
def test_effort_refuses_impossible_bounds(minimum: int, maximum: int) -> None:
    with pytest.raises(ValueError, match="minimum_pairs"):
        Effort(minimum_pairs=minimum, maximum_pairs=maximum)


def test_garbage_collector_is_off_while_timing_and_on_afterwards() -> None:
    during: list[bool] = []
    measure(Case("c", ours=lambda: during.append(gc.isenabled()), peer=int, check=agree, effort=QUICK))
    assert during == [True, False, False]
    assert gc.isenabled()


def test_garbage_collector_is_back_on_after_an_error() -> None:
    calls: list[int] = []

    def fails_when_timed() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure(Case("c", ours=int, peer=fails_when_timed, check=agree, effort=QUICK))
    assert gc.isenabled()
