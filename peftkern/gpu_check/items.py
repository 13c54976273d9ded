"""What can be timed, each with the launches it makes, found by running it on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from peftkern.backends import registry
from peftkern.backends.triton import crossover, launch
from peftkern.backends.triton.crossover import Path
from peftkern.backends.triton.launch import Launch
from peftkern.backends.triton.roofline import Arithmetic, Direction, arithmetic_of
from peftkern.formats import QuantizedTensor
from peftkern.gpu_check import peers, references
from peftkern.gpu_check.rows import Row
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.norm import NormForm
from peftkern.ops.quantize import quantize_reference
from peftkern.tune.measure import product
from peftkern.tune.operands import Operands, Subject, make
from peftkern.tune.timer import Timer


@dataclass(frozen=True)
class Bench:
    """Where items are timed, with what, and beside whom."""

    timer: Timer
    device: str
    peers: Sequence[str]
    backend: str = "triton"


class Item(Protocol):
    """Something to be timed."""

    @property
    def title(self) -> str:
        """In words."""
        ...

    def launches(self) -> list[Launch]:
        """Our launches, without a GPU: their names, bytes and FLOPs."""
        ...

    def run_once(self, device: str) -> None:
        """Run our kernels on a device, so that they are compiled."""
        ...

    def rows(self, bench: Bench) -> Iterator[Row]:
        """Time it."""
        ...


@dataclass(frozen=True)
class Operation:
    """Forward or backward of a group; ``path`` is forced, or ``None`` for the one that the table picks.

    ``native``: forward of one layer on the kernels that nvcc compiles.
    """

    subject: Subject
    tokens: int
    direction: Direction
    path: Path | None = None
    native: bool = False

    @property
    def title(self) -> str:
        dtype = str(self.subject.dtype).removeprefix("torch.")
        return f"{self._name(self.path)}, {self.subject.group}, {self.tokens} tokens, {dtype}"

    @property
    def peers(self) -> tuple[str, ...]:
        """Who else is timed."""
        return peers.OF_PRODUCTS if self.path is None else ()

    def _name(self, path: Path | None) -> str:
        how = "cuda" if self.native else path or "path by the table"
        return f"{self.direction} {self.subject.format or 'dense'} ({how})"

    def launches(self) -> list[Launch]:
        if self.native:
            return []
        operands = make(self.subject, self.tokens, "meta")
        with self._forced(), launch.recording() as launches:
            self._run(operands)
        return launches

    def run_once(self, device: str) -> None:
        with self._forced():
            self._run(make(self.subject, self.tokens, device))

    def rows(self, bench: Bench) -> Iterator[Row]:
        sets = self.operands(bench)
        path = self.path or self._chosen(sets[0])
        with self._forced():
            error = self._error(sets[0])
            seconds = bench.timer.seconds([partial(self._run, one) for one in sets])
        others = {name: self._peer_seconds(name, bench) for name in bench.peers if name in self.peers}
        yield Row(
            self._name(path),
            str(self.subject.group),
            self.tokens,
            seconds,
            self._moved(sets[0]),
            self._flops(),
            self.arithmetic,
            others,
            error,
            references.LIMITS[self.subject.dtype],
        )

    @property
    def arithmetic(self) -> Arithmetic:
        """What multiplies."""
        return arithmetic_of(self.subject.dtype)

    def operands(self, bench: Bench) -> list[Operands]:
        """Sets of operands whose h is the forward pass's, as many as exceed the cache."""
        first = replace(make(self.subject, self.tokens, bench.device), backend=bench.backend)
        first = replace(first, h=first.forward()[1])
        return first.copies(bench.timer.copies(first.bytes_touched))

    def _forced(self) -> ExitStack:
        stack = ExitStack()
        if self.path is not None:
            stack.enter_context(crossover.forced(self.path))
        return stack

    def _chosen(self, operands: Operands) -> Path | None:
        """What the table picks on a GPU; without one the table is not asked."""
        if not operands.x.is_cuda:
            return None
        group = self.subject.group
        shape = (self.tokens, group.out_features, group.in_features, len(group.outputs))
        quantized = self.subject.format is not None
        device = crossover.device_key(operands.x)
        return crossover.choose(self.direction, *shape, quantized, self.subject.dtype, device).path

    def _run(self, operands: Operands) -> Any:
        if self.native:
            (member,) = operands.members
            backend = "cuda" if operands.backend == "triton" else operands.backend
            y, h = registry.run("lora_linear", operands.x, member.weight, member.adapters, None, backend=backend)
            return [y], h
        return operands.forward() if self.direction == "forward" else operands.backward()

    def _error(self, operands: Operands) -> float:
        if self.direction == "forward":
            return references.forward_error(operands, self._run(operands)[0])
        return references.backward_error(operands, operands.backward())

    def _peer_seconds(self, name: str, bench: Bench) -> float:
        dense = make(replace(self.subject, format=None), self.tokens, bench.device)
        sets = dense.copies(bench.timer.copies(dense.bytes_touched))
        return bench.timer.seconds(peers.calls(name, sets, self.direction))

    def _moved(self, operands: Operands) -> int:
        """Weights, x and y once; backward weights, dY, x and dX once."""
        group, element = self.subject.group, self.subject.dtype.itemsize
        activations = self.tokens * (group.in_features + group.out_features) * element
        weights = operands.bytes_touched - activations
        again = self.tokens * group.in_features * element if self.direction == "backward" else 0
        return weights + activations + again

    def _flops(self) -> int:
        """Of the product and the adapters."""
        base = product(self.subject, self.direction, self.tokens).flops
        group = self.subject.group
        adapters = 2 * self.tokens * self.subject.rank * (group.in_features * len(group.outputs) + group.out_features)
        return base + (adapters if self.direction == "forward" else 2 * adapters)


@dataclass(frozen=True)
class Kernels:
    """Every kernel that an operation launches, by itself."""

    operation: Operation

    @property
    def title(self) -> str:
        return f"the kernels of {self.operation.title}"

    def launches(self) -> list[Launch]:
        return self.operation.launches()

    def run_once(self, device: str) -> None:
        """Nothing: the operation is timed as well."""

    def rows(self, bench: Bench) -> Iterator[Row]:
        recorded = [self._record(operands) for operands in self.operation.operands(bench)]
        for copies in zip(*recorded, strict=True):
            calls: list[Callable[[], object]] = [partial(launch.repeat, one.call) for one in copies]
            first, subject = copies[0], self.operation.subject
            yield Row(
                first.kernel,
                str(subject.group),
                self.operation.tokens,
                bench.timer.seconds(calls),
                first.bytes_read + first.bytes_written,
                first.flops,
                self.operation.arithmetic,
            )

    def _record(self, operands: Operands) -> list[Launch]:
        with self.operation._forced(), launch.recording(keep_calls=True) as launches:
            self.operation._run(operands)
        return launches


@dataclass(frozen=True)
class _Rowwise:
    """An operation without products, forward or backward, on [tokens, features]."""

    tokens: int
    features: int
    dtype: torch.dtype
    direction: Direction

    forward_operation: ClassVar[str]
    backward_operation: ClassVar[str]

    @property
    def title(self) -> str:
        return f"{self._operation}, {self.tokens}x{self.features}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def _operation(self) -> str:
        return self.forward_operation if self.direction == "forward" else self.backward_operation

    def launches(self) -> list[Launch]:
        with launch.recording() as launches:
            self.run_once("meta")
        return launches

    def run_once(self, device: str) -> None:
        self._call(self._input(device), "triton")()

    def rows(self, bench: Bench) -> Iterator[Row]:
        first = self._input(bench.device)
        sets = [[tensor.clone() for tensor in first] for _ in range(bench.timer.copies(_bytes(first)))]
        calls = [self._call(one, bench.backend) for one in sets]
        found = self._results(calls[0]())
        exact = self._results(self._call([tensor.double() for tensor in first], "reference")())
        error = max(references.relative_error(*pair) for pair in zip(found, exact, strict=True))
        shape, moved = f"{self.tokens}x{self.features}", _bytes([*first, *found])
        limit = references.LIMITS[self.dtype]
        seconds = bench.timer.seconds(calls)
        yield Row(self._operation, shape, self.tokens, seconds, moved, 0, "single", {}, error, limit)

    def _normal(self, count: int, device: str) -> list[Tensor]:
        return [torch.randn(self.tokens, self.features, device=device).to(self.dtype) for _ in range(count)]

    def _results(self, result: Any) -> list[Tensor]:
        listed = [result] if isinstance(result, Tensor) else list(result)
        return [tensor for tensor in listed if tensor is not None]

    def _input(self, device: str) -> list[Tensor]:
        raise NotImplementedError

    def _call(self, tensors: Sequence[Tensor], backend: str) -> Callable[[], Any]:
        raise NotImplementedError


class Gate(_Rowwise):
    """``silu(gate) * up`` of a feed-forward block."""

    forward_operation, backward_operation = "silu_mul", "silu_mul_backward"

    def _input(self, device: str) -> list[Tensor]:
        """gate and up, and backward the gradient in front of them."""
        return self._normal(2 if self.direction == "forward" else 3, device)

    def _call(self, tensors: Sequence[Tensor], backend: str) -> Callable[[], Any]:
        flags = () if self.direction == "forward" else (True, True)
        return partial(registry.run, self._operation, *tensors, *flags, backend=backend)


class Norm(_Rowwise):
    """An RMS norm with the addition of the residual in front of it, and all its gradients."""

    forward_operation, backward_operation = "norm", "norm_backward"

    def _input(self, device: str) -> list[Tensor]:
        """x and residual, or the gradients of y and of the sum and the sum; the weight; backward one over the size."""
        weight = torch.rand(self.features, device=device).to(self.dtype)
        if self.direction == "forward":
            return [*self._normal(2, device), weight]
        return [*self._normal(3, device), weight, torch.rand(self.tokens, device=device)]

    def _call(self, tensors: Sequence[Tensor], backend: str) -> Callable[[], Any]:
        form = NormForm(1e-6)
        if self.direction == "forward":
            return partial(registry.run, "norm", *tensors, None, form, backend=backend)
        *rest, rstd = tensors
        return partial(registry.run, "norm_backward", *rest, None, rstd, form, True, True, False, backend=backend)


class Rotation(_Rowwise):
    """The rotary embedding of queries and of a quarter as many keys; ``features`` is that of all heads of queries."""

    forward_operation, backward_operation = "rotary", "rotary"

    def _input(self, device: str) -> list[Tensor]:
        """Queries, keys, cosines and sines."""
        heads = self.features // _HEAD
        states = [
            torch.randn(1, self.tokens, count, _HEAD, device=device).to(self.dtype).transpose(1, 2)
            for count in (heads, max(1, heads // 4))
        ]
        angles = torch.rand(1, self.tokens, _HEAD, device=device)
        return [*states, angles.cos().to(self.dtype), angles.sin().to(self.dtype)]

    def _call(self, tensors: Sequence[Tensor], backend: str) -> Callable[[], Any]:
        q, k, cos, sin = tensors
        inverse = self.direction == "backward"
        return partial(registry.run, "rotary", (q, k), cos, sin, False, inverse, backend=backend)


_HEAD = 128
"""Numbers of a head."""


@dataclass(frozen=True)
class GatedBackward:
    """The backward pass of a feed-forward block's last layer, which makes its input again from gate and up."""

    subject: Subject
    tokens: int

    @property
    def title(self) -> str:
        dtype = str(self.subject.dtype).removeprefix("torch.")
        return f"{self._name}, {self.subject.group}, {self.tokens} tokens, {dtype}"

    @property
    def _name(self) -> str:
        return f"backward with its gate {self.subject.format or 'dense'}"

    def launches(self) -> list[Launch]:
        operands = make(self.subject, self.tokens, "meta")
        with launch.recording() as launches:
            self._call(operands, torch.randn_like(operands.x))()
        return launches

    def run_once(self, device: str) -> None:
        operands = make(self.subject, self.tokens, device)
        self._call(operands, torch.randn_like(operands.x))()

    def rows(self, bench: Bench) -> Iterator[Row]:
        first = replace(make(self.subject, self.tokens, bench.device), backend=bench.backend)
        up = torch.randn_like(first.x)
        first = replace(first, h=replace(first, x=nn.functional.silu(first.x) * up).forward()[1])
        sets = first.copies(bench.timer.copies(first.bytes_touched))
        calls = [self._call(one, up.clone()) for one in sets]
        grad_gate, grad_up, (grad_A,), (grad_B,) = calls[0]()
        exact_gate, exact_up, (exact_A,), (exact_B,) = self._call(references.in_float64(first), up.double())()
        pairs = ((grad_gate, exact_gate), (grad_up, exact_up), (grad_A, exact_A), (grad_B, exact_B))
        error = max(references.relative_error(*pair) for pair in pairs)
        moved = first.bytes_touched + _bytes([up, grad_gate, grad_up])
        flops = product(self.subject, "backward", self.tokens).flops
        limit, arithmetic = references.LIMITS[self.subject.dtype], arithmetic_of(self.subject.dtype)
        shape, seconds = str(self.subject.group), bench.timer.seconds(calls)
        yield Row(self._name, shape, self.tokens, seconds, moved, flops, arithmetic, {}, error, limit)

    def _call(self, operands: Operands, up: Tensor) -> Callable[[], Any]:
        (member,), (grad,) = operands.members, operands.grads
        tensors = (grad, operands.x, up, member.weight, member.adapters, operands.h)
        flags = (True, True, [True, True])
        return partial(registry.run, "gated_lora_linear_backward", *tensors, *flags, backend=operands.backend)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Conversion:
    """Quantize or dequantize one weight, bit for bit as the reference does."""

    operation: str
    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    backend: str
    double_quant: bool = False

    @property
    def title(self) -> str:
        return f"{self._name}, {self.shape[0]}x{self.shape[1]}"

    @property
    def _name(self) -> str:
        scales = ", double quantization" if self.double_quant else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation} {self.format}{scales}, {dtype} ({self.backend})"

    def launches(self) -> list[Launch]:
        if self.backend != "triton":
            return []
        with launch.recording() as launches:
            self.run_once("meta")
        return launches

    def run_once(self, device: str) -> None:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=device)
        self._call(self._input(dense), self.backend)()

    def rows(self, bench: Bench) -> Iterator[Row]:
        backend = self.backend if bench.backend == "triton" else bench.backend
        dense = torch.randn(self.shape, device=bench.device).to(self.dtype)
        copies = bench.timer.copies(dense.nbytes)
        inputs = [self._input(dense.clone()) for _ in range(copies)]
        calls = [self._call(one, backend) for one in inputs]
        found = _parts(calls[0]())
        error = references.differing_share(found, _parts(self._reference(inputs[0])))
        moved = _bytes([*_parts(inputs[0]), *found])
        shape = f"{self.shape[0]}x{self.shape[1]}"
        yield Row(self._name, shape, None, bench.timer.seconds(calls), moved, 0, "single", {}, error, 0.0)

    def _input(self, dense: Tensor) -> Tensor | QuantizedTensor:
        if self.operation == "quantize":
            return dense
        return quantize_reference(dense, self.format, double_quant=self.double_quant)

    def _call(self, value: Tensor | QuantizedTensor, backend: str) -> Callable[[], Any]:
        settings = (self.format, 64, self.double_quant) if self.operation == "quantize" else (self.dtype,)
        return partial(registry.run, self.operation, value, *settings, backend=backend)

    def _reference(self, value: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        if isinstance(value, QuantizedTensor):
            return dequantize_reference(value, self.dtype)
        return quantize_reference(value, self.format, double_quant=self.double_quant)


def _parts(value: Tensor | QuantizedTensor) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    nested = value.double_quantization
    return [value.packed, value.scales, *([] if nested is None else [nested.absmax, nested.offset])]
