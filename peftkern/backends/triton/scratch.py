"""One buffer per device and stream that decoded weights pass through, shared by all layers.

A weight is decoded into it, multiplied, and then overwritten by the next. Everything happens in the order of one
stream, so nothing waits; another stream has another buffer. ``unpatch`` frees them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry

_buffers: dict[tuple[torch.device, int], Tensor] = {}
_matrices: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
"""Views of the buffers that :func:`scratch_matrices` has given: making them takes the host longer than a launch."""


def scratch(like: Tensor, elements: int) -> Tensor:
    """A flat, uninitialised buffer of at least ``elements`` elements of ``like``'s dtype, on its device.

    It holds what was written until the next call on the same stream.
    """
    if like.is_meta:
        return like.new_empty(elements)
    key = (like.device, stream_of(like))
    wanted = elements * like.element_size()
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < wanted:
        _matrices.clear()
        _buffers[key] = buffer = torch.empty(wanted, dtype=torch.uint8, device=like.device)
    return buffer[:wanted].view(like.dtype)


def scratch_matrices(like: Tensor, rows: tuple[int, ...], columns: int) -> tuple[Tensor, ...]:
    """The same as matrices below each other, [rows_i, columns] each."""
    if like.is_meta:
        return tuple(like.new_empty(sum(rows), columns).split(rows))
    key = (like.device, stream_of(like), like.dtype, rows, columns)
    found = _matrices.get(key)
    if found is None:
        found = tuple(scratch(like, sum(rows) * columns).view(sum(rows), columns).split(rows))
        _matrices[key] = found
    return found


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


@registry.at_release
def free_scratch() -> None:
    """Give the buffers back to PyTorch's allocator, which waits for the streams that use them."""
    _matrices.clear()
    _buffers.clear()


def scratch_bytes() -> int:
    """Bytes held by all buffers."""
    return sum(buffer.numel() for buffer in _buffers.values())
