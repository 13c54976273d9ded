"""How many entries each layer gets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.sparse.budget import entries_per_layer, total_entries


def test_shares_by_hand() -> None:
    # 7 · 50/100 = 3.5, 7 · 30/100 = 2.1, 7 · 20/100 = 1.4: one is left, for the largest remainder
    assert entries_per_layer({"a": 50, "b": 30, "c": 20}, 7) == {"a": 4, "b": 2, "c": 1}


def test_equal_remainders_go_to_earlier_layers() -> None:
    assert entries_per_layer({"a": 10, "b": 10, "c": 10}, 4) == {"a": 2, "b": 1, "c": 1}


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(0, 10**10), min_size=1, max_size=8), share=st.floats(0, 1))
def test_shares_sum_up_and_none_is_larger_than_its_layer(sizes: list[int], share: float) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    total = min(int(share * sum(sizes)), sum(sizes))
    got = entries_per_layer(named, total)
    assert sum(got.values()) == total
    assert all(0 <= got[name] <= size for name, size in named.items())


def test_a_count_goes_before_the_density() -> None:
    assert total_entries("x", 1000, 0.5, 7) == 7
    assert total_entries("x", 1000, 0.0123, None) == 12
    assert total_entries("x", 10, 0.01, None) == 1


@pytest.mark.parametrize(("density", "count"), [(0.0, None), (1.5, None), (float("nan"), None), (0.5, 0), (0.5, 1001)])
def test_numbers_out_of_range_are_errors(density: float, count: int | None) -> None:
    with pytest.raises(ValueError, match=r"x: (density|count) must be"):
        total_entries("x", 1000, density, count)
