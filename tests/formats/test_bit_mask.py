from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.formats import BitMask, group_mask, largest_mask, random_group_mask, random_mask
from peftkern.formats.bit_mask import kept_count


def masks() -> st.SearchStrategy[torch.Tensor]:
    def build(shape: tuple[int, int], seed: int, density: float) -> torch.Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density

    sizes = st.tuples(st.integers(0, 9), st.integers(0, 40))
    return st.builds(build, sizes, st.integers(0, 2**20), st.sampled_from([0.0, 0.1, 0.5, 1.0]))


def test_hand_computed() -> None:
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [0, 3, 8]] = True  # 1 + 8; 1
    mask[1, [7, 9]] = True  # 128; 2
    packed = BitMask.from_mask(mask)
    assert packed.bits.tolist() == [[9, 1], [128, 2]]
    assert packed.kept() == 5
    assert packed.density == 0.25


@given(masks())
def test_packing_and_unpacking_are_inverse(mask: torch.Tensor) -> None:
    packed = BitMask.from_mask(mask)
    packed.validate()
    assert torch.equal(packed.mask(), mask)
    assert packed.kept() == int(mask.sum())
    assert packed.bits.numel() == mask.shape[0] * -(-mask.shape[1] // 8)


def test_a_mask_is_pickled_and_moved() -> None:
    packed = group_mask(torch.rand(3, 8), (2, 4))
    for copy in (pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert (copy.shape, copy.pattern) == (packed.shape, packed.pattern)
        assert torch.equal(copy.bits, packed.bits)
    moved = packed.to("meta")
    assert moved.device.type == "meta"
    moved.validate()


@pytest.mark.parametrize(
    ("elements", "density", "kept"),
    [(100, 0.29, 29), (1000, 0.001, 1), (12, 0.25, 3), (7, 0.5, 3), (10, 1.0, 10), (10, 0.0, 0), (99, 0.01, 0)],
)
def test_kept_count_is_that_of_the_decimal(elements: int, density: float, kept: int) -> None:
    assert kept_count(elements, density) == kept


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 30), density=st.sampled_from([0.0, 0.1, 0.25, 0.29, 0.5, 0.99, 1.0])
)
def test_a_random_mask_keeps_exactly_its_share(rows: int, columns: int, density: float) -> None:
    mask = random_mask((rows, columns), density, seed=4)
    assert mask.kept() == kept_count(rows * columns, density)
    assert torch.equal(mask.bits, random_mask((rows, columns), density, seed=4).bits)


def test_a_random_mask_follows_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_mask((64, 64), 0.5, seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(random_mask((64, 64), 0.5, seed=7).bits, first.bits)
    assert torch.equal(torch.get_rng_state(), before)
    other = random_mask((64, 64), 0.5, seed=8).mask()
    agreement = float((other == first.mask()).float().mean())
    assert 0.45 < agreement < 0.55


def test_a_random_mask_is_uniform() -> None:
    kept = sum(random_mask((4, 8), 0.25, seed).mask().double() for seed in range(2000)) / 2000
    # 32 frequencies of 2000 draws: a standard deviation of 0.0097 each
    assert float((kept - 0.25).abs().max()) < 0.04


def test_of_equal_scores_the_first_are_kept() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]])
    assert largest_mask(scores, 3).mask().tolist() == [[False, True, True], [False, False, True]]
    assert largest_mask(torch.zeros(2, 3), 4).mask().reshape(-1).tolist() == [True] * 4 + [False] * 2
    assert largest_mask(scores, 0).kept() == 0


@given(count=st.integers(0, 60), seed=st.integers(0, 1000))
def test_the_largest_are_those_of_a_stable_sort(count: int, seed: int) -> None:
    scores = torch.randint(8, (6, 10), generator=torch.Generator().manual_seed(seed)).float() - 3
    expected = torch.zeros(60, dtype=torch.bool)
    expected[scores.view(-1).argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(largest_mask(scores, count).mask().view(-1), expected)


def test_groups_keep_their_largest_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0, 0.0, -1.0, 5.0]])
    mask = group_mask(scores, (2, 4))
    assert mask.mask().int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 1]]
    assert mask.pattern == (2, 4)


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (4, 8), (1, 3), (5, 5)])
def test_every_group_of_a_random_mask_keeps_n(pattern: tuple[int, int]) -> None:
    n, m = pattern
    mask = random_group_mask((6, 4 * m), pattern, seed=3)
    assert bool((mask.mask().view(-1, m).sum(1) == n).all())
    assert torch.equal(mask.bits, random_group_mask((6, 4 * m), pattern, seed=3).bits)


def test_what_is_not_finite_is_ordered_or_refused() -> None:
    scores = torch.tensor([[float("inf"), 1.0, -float("inf")]])
    assert largest_mask(scores, 2).mask().tolist() == [[True, True, False]]
    scores[0, 1] = float("nan")
    for make in (lambda: largest_mask(scores, 1), lambda: group_mask(scores, (1, 3))):
        with pytest.raises(ValueError, match="NaN"):
            make()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="bool"):
        BitMask.from_mask(torch.ones(2, 8))
    with pytest.raises(ValueError, match="more than pattern 1:2"):
        BitMask.from_mask(torch.ones(2, 8, dtype=torch.bool), (1, 2))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        group_mask(torch.ones(2, 6), (2, 4))
    with pytest.raises(ValueError, match="1 <= n <= m"):
        random_group_mask((2, 8), (5, 4), 0)
    with pytest.raises(ValueError, match="between 0 and 16, got 17"):
        largest_mask(torch.ones(2, 8), 17)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        random_mask((2, 8), 1.5, 0)
    with pytest.raises(ValueError, match="out, in"):
        largest_mask(torch.ones(8), 1)


def test_fields_that_do_not_fit_are_found() -> None:
    mask = BitMask.from_mask(torch.ones(3, 10, dtype=torch.bool))
    broken = [
        dataclasses.replace(mask, bits=mask.bits[:2]),
        dataclasses.replace(mask, bits=mask.bits.int()),
        dataclasses.replace(mask, shape=torch.Size((3, 17))),
        dataclasses.replace(mask, shape=torch.Size((30,))),
        dataclasses.replace(mask, pattern=(2, 4)),
    ]
    for wrong in broken:
        with pytest.raises(ValueError, match="BitMask"):
            wrong.validate()
