"""The one place where a Triton kernel is launched, or, on tensors without memory, only counted.

Every launch names what it reads and writes, each byte once, so that :func:`recording` can add up the traffic of a whole
training step on the ``meta`` device (``peftkern bench traffic-bytes``) by running the very code that a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
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
    traffic: Callable[[], Traffic],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Launch ``kernel`` on the current stream of the device of its tensors.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along each axis, at least one.
        arguments: of the kernel, up to its constants; tuples of tensors and numbers included.
        traffic: says what is read and written; asked only while somebody records.
        num_warps: warps of one program.
        num_stages: iterations whose loads are in flight.
        constants: the kernel's ``tl.constexpr`` parameters.
    """
    tensor = _first_tensor(arguments)
    call = Call(kernel, grid, arguments, constants, num_warps, num_stages)
    if _recordings or _observers:
        _record(call, traffic(), tensor.is_meta)
    if tensor.is_meta:
        return
    with nullcontext() if tensor.get_device() == _current_device() else torch.cuda.device_of(tensor):
        repeat(call)


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, tuple) and argument:
            return _first_tensor(argument)
    raise TypeError("launch: a kernel needs a tensor among its arguments")


# ---- the host's part of a launch
#
# Triton looks at every argument and option anew before each launch, which takes the host longer than the GPU needs for
# the kernel. What it compiles depends on little of that, so what it has compiled is found here by that little.


def repeat(call: Call) -> None:
    """Launch again what :func:`launch` has launched on the current device, on its current stream."""
    deciding: list[Any] = [id(call.kernel), _current_device(), call.num_warps, call.num_stages]
    deciding += call.constants.values()
    arguments = _plain(call.arguments, deciding)
    key = tuple(deciding)
    found = _compiled.get(key)
    if found is None:
        _launch_first(call, key)
        return
    compiled, constants = found
    compiled[(*call.grid, 1, 1)[:3]](*arguments, *constants)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Kernels and the values of their constants, in the order of the kernel's parameters."""


def _launch_first(call: Call, key: tuple[Any, ...]) -> None:
    """Let Triton launch; what it has compiled is kept. Whatever executes kernels in its place gives nothing to keep."""
    from triton.compiler import CompiledKernel

    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, **COMPILER_OPTIONS}
    compiled = call.kernel[call.grid](*call.arguments, **call.constants, **options)
    if isinstance(compiled, CompiledKernel):
        names = call.kernel.arg_names[len(call.arguments) :]
        _compiled[key] = compiled, tuple(call.constants[name] for name in names)


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _plain(arguments: tuple[Any, ...], deciding: list[Any]) -> tuple[Any, ...]:
    """``arguments`` with addresses for tensors; what Triton compiles for is added to ``deciding``.

    That is of a tensor its dtype and whether 16 divides its address, and of a whole number whether it is 1, whether 16
    divides it, and its width.
    """
    plain: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            plain.append(argument)
            deciding.append(_whole(argument))
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            plain.append(address)
            deciding.append(argument.dtype if address % 16 == 0 else (argument.dtype,))
        elif isinstance(argument, tuple):
            deciding.append(len(argument))
            plain.append(_plain(argument, deciding))
        else:
            plain.append(argument)
            deciding.append(argument if argument is None else kind)
    return tuple(plain)


def _whole(number: int) -> Any:
    """What counts of a whole number: whether it is 1, whether 16 divides it, and whether it is an int32 or wider."""
    if -(1 << 31) <= number < 1 << 31:
        return 1 if number == 1 else 16 if number % 16 == 0 else 2
    return (number % 16 == 0, number >= 1 << 63)


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
