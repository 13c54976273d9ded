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


def test_tensors_without_memory_take_none() -> None:
    assert scratch.scratch(torch.empty(0, device="meta"), 10).is_meta
    assert scratch.scratch_bytes() == 0


def test_unpatch_frees_it() -> None:
    scratch.scratch(torch.empty(0), 10)
    model = nn.Sequential(nn.Linear(4, 4))
    patch(model)
    unpatch(model)
    assert scratch.scratch_bytes() == 0
