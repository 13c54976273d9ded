"""Which way a ratio goes, and what the minimum and the maximum are of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkern.bench.result import Quantity, summarise

positive = st.floats(1e-6, 1e6)
pairs = st.lists(st.tuples(positive, positive), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("quantity", "ratio"),
    [
        (Quantity.TIME, 2.0),
        (Quantity.RATE, 0.5),
        (Quantity.MEMORY, 0.5),
        (Quantity.LOSS, 0.5),
        (Quantity.COUNT, 0.5),
        (Quantity.SHARE, 0.5),
    ],
)
def test_direction_of_the_ratio(quantity: Quantity, ratio: float) -> None:
    result = summarise("n", "c", "u", quantity, [10.0, 10.0], [20.0, 20.0])
    assert (result.ratio, result.min, result.max) == (ratio, ratio, ratio)
    assert (result.ours, result.peer) == (10.0, 20.0)


def test_time_is_a_ratio_of_medians_and_the_spread_is_over_pairs() -> None:
    result = summarise("n", "c", "ms", Quantity.TIME, [1.0, 2.0, 4.0], [8.0, 6.0, 4.0])
    assert (result.ours, result.peer, result.ratio) == (2.0, 6.0, 3.0)
    assert (result.min, result.max) == (1.0, 8.0)


def test_loss_is_the_last_one_and_the_spread_is_over_steps() -> None:
    result = summarise("n", "c", "loss", Quantity.LOSS, [4.0, 3.0, 2.0], [4.0, 2.0, 2.0])
    assert (result.ours, result.peer, result.ratio) == (2.0, 2.0, 1.0)
    assert (result.min, result.max) == (1.0, 1.5)


def test_difference_is_the_largest() -> None:
    result = summarise("n", "c", "relative", Quantity.DIFFERENCE, [1e-6, 3e-6, 2e-6], [0.0, 0.0, 0.0])
    assert (result.ours, result.peer, result.ratio) == (3e-6, 0.0, 3e-6)
    assert (result.min, result.max) == (1e-6, 3e-6)


def test_share_is_a_mean_and_its_minimum_shows_a_single_miss() -> None:
    result = summarise("n", "c", "share", Quantity.SHARE, [1.0, 1.0, 0.0, 1.0], [1.0] * 4)
    assert (result.ours, result.ratio, result.min, result.max) == (0.75, 0.75, 0.0, 1.0)


@given(pairs)
def test_ratio_lies_between_minimum_and_maximum(samples: list[tuple[float, float]]) -> None:
    ours, peer = [one for one, _ in samples], [other for _, other in samples]
    for quantity in (Quantity.TIME, Quantity.RATE, Quantity.MEMORY, Quantity.LOSS, Quantity.COUNT, Quantity.SHARE):
        result = summarise("n", "c", "u", quantity, ours, peer)
        assert result.min * (1 - 1e-9) <= result.ratio <= result.max * (1 + 1e-9)


@pytest.mark.parametrize(("ours", "peer"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_samples_must_come_in_pairs(ours: list[float], peer: list[float]) -> None:
    with pytest.raises(ValueError, match="equally long"):
        summarise("n", "c", "ms", Quantity.TIME, ours, peer)
