from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.formats import SparseIndices


def masks() -> st.SearchStrategy[torch.Tensor]:
    def build(shape: tuple[int, int], seed: int, density: float) -> torch.Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density

    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    return st.builds(build, sizes, st.integers(0, 2**20), st.sampled_from([0.0, 0.1, 0.5, 1.0]))


@given(masks())
def test_both_orders_hold_the_same_entries(mask: torch.Tensor) -> None:
    indices = SparseIndices.from_mask(mask)
    indices.validate()
    assert torch.equal(indices.mask(), mask)
    assert len(indices) == int(mask.sum())
    flat = indices.flat()
    assert torch.equal(flat, mask.reshape(-1).nonzero().reshape(-1))
    columns = torch.repeat_interleave(torch.arange(mask.shape[1]), indices.column_offsets.diff())
    assert torch.equal(flat[indices.order.long()], indices.rows.long() * mask.shape[1] + columns)
    assert torch.equal(columns, columns.sort().values)


@given(masks())
def test_gather_and_to_dense_are_inverse(mask: torch.Tensor) -> None:
    indices = SparseIndices.from_mask(mask)
    values = torch.arange(1.0, len(indices) + 1)
    assert torch.equal(indices.gather(indices.to_dense(values)), values)
    assert torch.equal(indices.to_dense(values) != 0, mask)


def test_hand_computed() -> None:
    indices = SparseIndices.from_flat(torch.tensor([1, 3, 4]), (2, 3))  # (0, 1), (1, 0), (1, 1)
    assert indices.row_offsets.tolist() == [0, 1, 3]
    assert indices.columns.tolist() == [1, 0, 1]
    assert indices.column_offsets.tolist() == [0, 1, 3, 3]
    assert indices.rows.tolist() == [1, 0, 1]
    assert indices.order.tolist() == [1, 0, 2]
    assert indices.density == 0.5


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        (torch.tensor([1, 1]), "ascend strictly"),
        (torch.tensor([2, 1]), "ascend strictly"),
        (torch.tensor([0, 6]), "within 0 and 5"),
        (torch.tensor([-1, 2]), "within 0 and 5"),
        (torch.tensor([0.0]), "integers"),
        (torch.tensor([[0]]), "integers"),
    ],
)
def test_bad_entries_are_refused(flat: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparseIndices.from_flat(flat, (2, 3))


def test_fields_that_do_not_fit_are_found() -> None:
    indices = SparseIndices.from_flat(torch.tensor([1, 3]), (2, 3))
    broken = dataclasses.replace(indices, rows=indices.rows[:1])
    with pytest.raises(ValueError, match="rows must be"):
        broken.validate()
    with pytest.raises(ValueError, match="bool"):
        SparseIndices.from_mask(torch.ones(2, 2))
