"""The sparse part of a matrix beside a low-rank one: outliers are found, exactly as many as asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.sparse.decomposition import sparse_entries


def low_rank_and_spikes(shape: tuple[int, int], seed: int, spikes: int = 5, rank: int = 2) -> tuple[Tensor, list[int]]:
    """A matrix of this rank whose entries are about 0.03, and spikes of 0.1 to 0.2 over it."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=generator) for size in shape)
    weight = 0.02 * left @ right.t()
    places = torch.randperm(weight.numel(), generator=generator)[:spikes].sort().values
    signs = 2 * torch.randint(0, 2, (spikes,), generator=generator) - 1
    weight.view(-1)[places] += signs * (0.1 + 0.1 * torch.rand(spikes, generator=generator))
    return weight, places.tolist()


@pytest.mark.parametrize("rank", [2, 16, 500])
@pytest.mark.parametrize("shape", [(40, 30), (64, 64), (20, 90)])
@pytest.mark.parametrize("seed", range(4))
def test_spikes_over_a_matrix_of_rank_2_are_found(shape: tuple[int, int], seed: int, rank: int) -> None:
    weight, places = low_rank_and_spikes(shape, seed)
    assert sparse_entries(weight, 5, rank=rank).tolist() == places


def test_they_are_not_just_the_largest_entries() -> None:
    weight, places = low_rank_and_spikes((64, 64), 1)
    assert weight.abs().flatten().topk(5).indices.sort().values.tolist() != places
    assert sparse_entries(weight, 5).tolist() == places


def test_by_hand() -> None:
    weight = torch.outer(torch.arange(1.0, 9.0), torch.ones(8))
    weight[1, 5] = 5.0  # 2 without the outlier, which is smaller than entries of other rows
    assert sparse_entries(weight, 1, rank=1).tolist() == [13]


@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_exactly_as_many_as_asked_for_also_where_all_are_equal(count: int) -> None:
    assert sparse_entries(torch.zeros(4, 6), count).tolist() == list(range(count))
    chosen = sparse_entries(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), count).tolist()
    assert len(chosen) == count and chosen == sorted(set(chosen))


def test_the_seed_decides() -> None:
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(2))
    first, second, other = (sparse_entries(weight, 40, rank=2, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == second != other


def test_more_entries_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        sparse_entries(torch.zeros(2, 2), 5)
