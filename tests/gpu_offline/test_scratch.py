"""The buffer that decoded weights pass through: shared, as large as the largest of them, freed by unpatch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from peftkern.backends.triton import scratch
from peftkern.patch import patch, unpatch


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The current stream, last in the list; nothing is kept from test to test."""
    current = [0]
    monkeypatch.setattr(scratch, "stream_of", lambda _tensor: current[-1])
    scratch.free_scratch()
    yield current
    scratch.free_scratch()


def test_one_buffer_serves_all_weights_and_dtypes() -> None:
    large = scratch.scratch(torch.empty(0), 100)
    small = scratch.scratch(torch.empty(0, dtype=torch.bfloat16), 30)
    assert (large.dtype, large.shape, small.dtype, small.shape) == (torch.float32, (100,), torch.bfloat16, (30,))
    assert small.data_ptr() == large.data_ptr()
    assert scratch.scratch_bytes() == 400


def test_it_grows() -> None:
    scratch.scratch(torch.empty(0), 10)
    assert scratch.scratch(torch.empty(0), 20).shape == (20,)
    assert scratch.scratch_bytes() == 80


def test_another_stream_has_another_buffer(streams: list[int]) -> None:
    first = scratch.scratch(torch.empty(0), 10)
    streams.append(1)
    assert scratch.scratch(torch.empty(0), 10).data_ptr() != first.data_ptr()


def test_matrices_lie_below_each_other_in_it_and_are_made_once() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    first, second = scratch.scratch_matrices(like, (3, 2), 4)
    assert (first.shape, second.shape, first.dtype) == ((3, 4), (2, 4), torch.bfloat16)
    assert first.data_ptr() == scratch.scratch(like, 1).data_ptr()
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert scratch.scratch_matrices(like, (3, 2), 4)[0] is first
    assert scratch.scratch_matrices(like, (2, 3), 4)[0].shape == (2, 4)


def test_matrices_follow_the_buffer_when_it_grows_or_is_freed() -> None:
    like = torch.empty(0)
    scratch.scratch_matrices(like, (1,), 4)
    large = scratch.scratch(like, 1000)
    assert scratch.scratch_matrices(like, (1,), 4)[0].data_ptr() == large.data_ptr()
    scratch.free_scratch()
    assert scratch._matrices == {}


def test_matrices_of_another_stream_are_elsewhere(streams: list[int]) -> None:
    (first,) = scratch.scratch_matrices(torch.empty(0), (2,), 4)
    streams.append(1)
    assert scratch.scratch_matrices(torch.empty(0), (2,), 4)[0].data_ptr() != first.data_ptr()


def test_tensors_without_memory_take_none() -> None:
    assert scratch.scratch(torch.empty(0, device="meta"), 10).is_meta
    assert scratch.scratch_bytes() == 0


def test_unpatch_frees_it() -> None:
    scratch.scratch(torch.empty(0), 10)
    model = nn.Sequential(nn.Linear(4, 4))
    patch(model)
    unpatch(model)
    assert scratch.scratch_bytes() == 0
