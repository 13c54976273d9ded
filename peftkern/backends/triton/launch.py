"""The one place where a Triton kernel is launched, or, on tensors without memory, only counted.

Every launch names what it reads and writes, each byte once, so that :func:`recording` can add up the traffic of a whole
training step on the ``meta`` device (``peftkern bench traffic-bytes``) by running the very code that a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

COMPILER_OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": False}
"""Without contraction a product is rounded before it is added: what bit-identity to bitsandbytes needs."""


@dataclass(frozen=True)
class Call:
    """What a kernel was launched with: all that decides what Triton compiles it to, and what :func:`repeat` needs.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid, arguments, constants, num_warps, num_stages: as :func:`launch` takes them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch: bytes read and written, each byte once, and floating-point operations.

    ``call`` is there for tensors without memory, and where the recording keeps it: it keeps memory alive.
    """

    kernel: str
    bytes_read: int
    bytes_written: int
    flops: int
    call: Call | None


@dataclass(frozen=True)
class Traffic:
    """What one launch reads and writes. A tensor that is read and written stands in both."""

    reads: Sequence[Tensor | None]
    writes: Sequence[Tensor | None]
    flops: int = 0


class _Recording(list[Launch]):
    def __init__(self, keep_calls: bool) -> None:
        super().__init__()
        self.keep_calls = keep_calls


_recordings: list[_Recording] = []
_observers: list[Callable[[Launch], None]] = []


@contextmanager
def recording(keep_calls: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches made inside. Tensors may then be on the ``meta`` device; nothing runs on those.

    With ``keep_calls`` launches on a GPU can be repeated; their memory lives as long as what was collected.
    """
    launches = _Recording(keep_calls)
    _recordings.append(launches)
    try:
        yield launches
    finally:
        # by identity: lists compare equal when the same was launched in both
        _recordings[:] = [recorded for recorded in _recordings if recorded is not launches]


@contextmanager
def observing(note: Callable[[Launch], None]) -> Iterator[None]:
    """Hand each launch made inside to ``note`` as it is made, without its call; else as :func:`recording`."""
    _observers.append(note)
    try:
        yield
    finally:
        _observers.pop()


def is_recording() -> bool:
    """Whether some :func:`recording` or :func:`observing` is open."""
    return bool(_recordings or _observers)


def is_ours(tensor: Tensor) -> bool:
    """Whether this backend is for ``tensor``: on a GPU, or without memory while launches are only counted."""
    return tensor.is_cuda or (tensor.is_meta and is_recording())


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    traffic: Traffic,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Launch ``kernel`` on the current stream of the device of its tensors.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along each axis, at least one.
        arguments: of the kernel, up to its constants; tuples of tensors and numbers included.
        traffic: what is read and written.
        num_warps: warps of one program.
        num_stages: iterations whose loads are in flight.
        constants: the kernel's ``tl.constexpr`` parameters.
    """
    tensors = [tensor for tensor in (*traffic.reads, *traffic.writes) if tensor is not None]
    call = Call(kernel, grid, arguments, constants, num_warps, num_stages)
    counted_only = tensors[0].is_meta
    if is_recording():
        _record(call, traffic, counted_only)
    if counted_only:
        return
    with _device_of(tensors[0]):
        repeat(call)


def repeat(call: Call) -> None:
    """Launch again what :func:`launch` has launched on the current device, on its current stream."""
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, **COMPILER_OPTIONS}
    call.kernel[call.grid](*call.arguments, **call.constants, **options)


def unremarkable(number: int) -> int:
    """A number from 0 to below 2^59 as an argument that decides nothing: a kernel takes ``argument >> 2``, lower bits.

    Triton compiles a kernel anew for a number that is 1, a multiple of 16, or of another width. This one is never.
    """
    return 1 << 62 | number << 2 | 2


def _record(call: Call, traffic: Traffic, counted_only: bool) -> None:
    moved = _bytes(traffic.reads), _bytes(traffic.writes)
    launched = Launch(call.kernel.__name__, *moved, traffic.flops, None)
    for recorded in _recordings:
        recorded.append(replace(launched, call=call) if counted_only or recorded.keep_calls else launched)
    for note in _observers:
        note(launched)


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _device_of(tensor: Tensor) -> Any:
    import torch

    return torch.cuda.device_of(tensor)
