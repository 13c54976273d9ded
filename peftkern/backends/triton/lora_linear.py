"""`lora_linear` and its group on a GPU: picks the path of each product and launches its kernels.

Formulas and shapes are in :mod:`peftkern.ops.lora_linear`; the paths in :mod:`.crossover`. A single layer is a group of
one. What a launch cannot take is taken apart: weights of different kinds, or different numbers of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.triton.adapter_gradients import Gate, pull, push
from peftkern.backends.triton.adapters import Slots, all_slots, launches_of, new_inner, total_rank
from peftkern.backends.triton.configurations import Tile, few_tokens_kernel, gradient_parts, tile_for
from peftkern.backends.triton.crossover import Path, choose, device_key
from peftkern.backends.triton.dequantize import dequantize_group
from peftkern.backends.triton.few_tokens import few_tokens
from peftkern.backends.triton.input_gradient import input_gradient
from peftkern.backends.triton.product import product
from peftkern.backends.triton.project import project
from peftkern.backends.triton.reduce import sum_parts
from peftkern.backends.triton.scratch import scratch_matrices
from peftkern.backends.triton.silu_mul import silu_mul_backward
from peftkern.backends.triton.weights import DENSE, WeightArguments, weight_arguments, weight_kind
from peftkern.formats import QuantizedTensor
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.lora_linear_group import Member

LARGEST_SHARED_RANK = 64
"""Up to this padded rank three adapters' sums fit the registers of one program."""


# ---- one layer


def lora_linear(x: Tensor, weight: Weight, adapters: Adapters, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.lora_linear.lora_linear_reference` for shapes."""
    (y,), h = group_forward(x, [Member(weight, adapters, bias)])
    return y, h


def lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.lora_linear.lora_linear_backward_reference` for shapes."""
    member = Member(weight, adapters, None)
    grad_x, (grad_A,), (grad_B,) = group_backward([grad], x, [member], h, need_x, [need_lora])
    return grad_x, grad_A, grad_B


def gated_lora_linear_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_gate: bool,
    need_up: bool,
    need_lora: Sequence[bool],
    activation: str,
    free: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.gated_lora_linear.gated_lora_linear_backward_reference` for shapes."""
    member, need_x = Member(weight, adapters, None), need_gate or need_up
    made_of = None if up is None else Gate(_unit_stride(up), activation)
    grad_x, (grad_A,), (grad_B,) = group_backward([grad], gate, [member], h, need_x, [need_lora], made_of)
    if grad_x is None:
        return None, None, grad_A, grad_B
    return *silu_mul_backward(grad_x, gate, up, need_gate, need_up, activation, free), grad_A, grad_B


# ---- a group


def group_forward(x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Tensor]:
    """Forward of layers that share x; see :mod:`peftkern.ops.lora_linear_group` for shapes."""
    x = _unit_stride(x)
    y = [x.new_empty(x.shape[0], member.weight.shape[0]) for member in members]
    h = new_inner(x, x.shape[0], total_rank([member.adapters for member in members]))
    if x.shape[0] == 0:
        return y, h
    begin = 0
    for first, last in _uniform(members):
        width = total_rank([member.adapters for member in members[first:last]])
        _forward(x, members[first:last], y[first:last], h[:, begin : begin + width])
        begin += width
    return y, h


def _forward(x: Tensor, members: Sequence[Member], y: Sequence[Tensor], h: Tensor) -> None:
    call = _Call.of(x, members)
    weights = [member.weight for member in members]
    bias = [member.bias for member in members if member.bias is not None] or None
    slots = all_slots([member.adapters for member in members])
    path = call.path("forward")
    if path == Path.FEW and _fits_few(slots, len(members)):
        # h is written side by side with other members' only where it has them to itself
        inner = h if h.is_contiguous() else torch.empty_like(h, memory_format=torch.contiguous_format)
        tile = call.tile(few_tokens_kernel(call.tokens))
        few_tokens(x, weight_arguments(weights), slots, bias, y, inner, tile, call.precision)
        if inner is not h:
            h.copy_(inner)
        return
    _project(call, x, slots, len(members), h)
    if path == Path.VENDOR:
        _vendor_forward(call, x, weights, slots, bias, y, h)
        return
    arguments, tile = _operand(call, path, weights)
    product(x, arguments, h, slots, bias, y, tile, call.precision)


def _project(call: _Call, x: Tensor, slots: Slots, members: int, h: Tensor) -> None:
    for some in _skinny_launches(slots, members):
        kernel = "project" if len(some) < 3 else "project of three"
        project(x, some, h, call.tile(kernel, tight=_is_wide(some)), call.precision)


def _vendor_forward(
    call: _Call,
    x: Tensor,
    weights: Sequence[Weight],
    slots: Slots,
    bias: Sequence[Tensor] | None,
    y: Sequence[Tensor],
    h: Tensor,
) -> None:
    """The adapters' part goes first, so that the sum with the larger part is rounded once, by the vendor's product."""
    matrices = _dense(weights, x)
    if len(slots) or bias is not None:
        product(x, None, h, slots, bias, y, call.tile("low rank"), call.precision)
    for matrix, result in zip(matrices, y, strict=True):
        if len(slots) or bias is not None:
            torch.addmm(result, x, matrix.t(), out=result)
        else:
            torch.mm(x, matrix.t(), out=result)


def group_backward(
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    members: Sequence[Member],
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[Sequence[bool]],
    gate: Gate | None = None,
) -> tuple[Tensor | None, list[list[Tensor | None]], list[list[Tensor | None]]]:
    """Backward of layers that share x; see :mod:`peftkern.ops.lora_linear_group` for shapes.

    With ``gate``, x is ``activation(x) * up``, made again where it is read.
    """
    gradients = _AdapterGradients.of(members, need_lora)
    widths = [total_rank([member.adapters]) for member in members]
    grad_x: Tensor | None = None
    for first, last in _uniform(members, grads):
        kept = [grad for grad in grads[first:last] if grad is not None]
        if not kept:
            continue
        begin = sum(widths[:first])
        columns = h[:, begin : begin + sum(widths[first:last])]
        part = _backward(kept, x, gate, members[first:last], columns, need_x, need_lora[first:last], gradients, first)
        grad_x = part if grad_x is None or part is None else grad_x.add_(part)
    return grad_x, gradients.grad_A, gradients.grad_B


def _backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    gate: Gate | None,
    members: Sequence[Member],
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[Sequence[bool]],
    gradients: _AdapterGradients,
    first: int,
) -> Tensor | None:
    grads = [_unit_stride(grad) for grad in grads]
    tokens = grads[0].shape[0]
    if tokens == 0:
        gradients.fill_zeros(range(first, first + len(members)))
        return grads[0].new_empty(0, members[0].weight.shape[1]) if need_x else None
    call = _Call.of(grads[0], members)
    slots = all_slots([member.adapters for member in members])
    need_A = any(flag for flags in need_lora for flag in flags[: len(flags) // 2])
    need_B = any(flag for flags in need_lora for flag in flags[len(flags) // 2 :])
    g = new_inner(grads[0], tokens, h.shape[1]) if len(slots) and (need_x or need_A) else None
    if g is not None or need_B:
        _pull(call, grads, h, slots, g, need_B, gradients, first)
    grad_x = None
    if need_x:
        inner = g if g is not None else new_inner(grads[0], tokens, 0)
        grad_x = _input_gradient(call, grads, members, slots, inner)
    if need_A:
        assert x is not None and g is not None
        _push(call, _unit_stride(x), gate, g, slots, len(members), gradients, first)
    return grad_x


def _pull(
    call: _Call,
    grads: Sequence[Tensor],
    h: Tensor,
    slots: Slots,
    g: Tensor | None,
    need_B: bool,
    gradients: _AdapterGradients,
    first: int,
) -> None:
    """Write g and dB: every adapter's parts, then their sums."""
    sums = _Sums([], [])
    g_parts = None if g is None else sums.parts_of(g, gradient_parts(max(grad.shape[1] for grad in grads)))
    for index, some in enumerate(_adapter_launches(slots, len(grads))):
        tile = call.tile("pull")
        token_tiles = -(-call.tokens // tile.tokens)
        totals = gradients.new_b(index, range(first, first + len(grads))) if need_B else []
        B_parts = [sums.parts_of(total, token_tiles) for total in totals]
        for chosen in _one_launch_or_each(some):
            chosen_parts = [B_parts[i] for i in chosen] if need_B else None
            pull([grads[i] for i in chosen], h, some.only(chosen), g_parts, chosen_parts, tile, call.precision)
    if sums.parts:
        sum_parts(sums.parts, sums.totals)


@dataclass(frozen=True)
class _Sums:
    """Results that are written in parts, and where their sums go."""

    parts: list[Tensor]
    totals: list[Tensor]

    def parts_of(self, total: Tensor, count: int) -> Tensor:
        """[count, *shape] to be written: the result itself if it is one part, else one more sum."""
        if count == 1:
            return total[None]
        self.parts.append(new_inner(total, count, *total.shape))
        self.totals.append(total)
        return self.parts[-1]


def _push(
    call: _Call,
    x: Tensor,
    gate: Gate | None,
    g: Tensor,
    slots: Slots,
    members: int,
    gradients: _AdapterGradients,
    first: int,
) -> None:
    for index, some in enumerate(_adapter_launches(slots, members)):
        grad_A = gradients.new_a(index, range(first, first + members))
        tile = call.tile("push")
        for chosen in _one_launch_or_each(some):
            push(x, gate, g, some.only(chosen), [grad_A[i] for i in chosen], tile, call.precision)


def _input_gradient(call: _Call, grads: Sequence[Tensor], members: Sequence[Member], slots: Slots, g: Tensor) -> Tensor:
    weights = [member.weight for member in members]
    grad_x = grads[0].new_empty(call.tokens, weights[0].shape[1])
    path = call.path("backward")
    if path != Path.VENDOR:
        arguments, tile = _operand(call, path, weights)
        input_gradient(grads, arguments, g, slots, grad_x, tile, call.precision)
        return grad_x
    matrices = _dense(weights, grads[0])
    if len(slots):
        input_gradient(grads, None, g, slots, grad_x, call.tile("low rank"), call.precision)
    for number, (grad, matrix) in enumerate(zip(grads, matrices, strict=True)):
        if len(slots) or number:
            torch.addmm(grad_x, grad, matrix, out=grad_x)
        else:
            torch.mm(grad, matrix, out=grad_x)
    return grad_x


# ---- what the steps share


@dataclass(frozen=True)
class _Call:
    """What decides paths and tiles. ``tight``: registers go to more than the product (:mod:`.configurations`)."""

    tokens: int
    out_features: int
    in_features: int
    members: int
    quantized: bool
    tight: bool
    like: Tensor

    @staticmethod
    def of(activations: Tensor, members: Sequence[Member]) -> _Call:
        weights = [member.weight for member in members]
        quantized = weight_kind(weights[0]).format != DENSE or weights[0].dtype != activations.dtype
        outputs = sum(weight.shape[0] for weight in weights)
        tight = any(_is_tight(member) for member in members)
        return _Call(activations.shape[0], outputs, weights[0].shape[1], len(members), quantized, tight, activations)

    @property
    def architecture(self) -> int:
        major, minor = device_key(self.like).capability
        return 10 * major + minor

    @property
    def precision(self) -> str:
        """Of float32 products: "highest" is IEEE, everything below admits TF32."""
        highest = self.like.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        return "ieee" if highest else "tf32"

    def path(self, direction: Any) -> Path:
        shape = (self.tokens, self.out_features, self.in_features, self.members, self.quantized)
        return choose(direction, *shape, self.like.dtype, device_key(self.like)).path

    def tile(self, kernel: str, tight: bool = False) -> Tile:
        return tile_for(kernel, self.architecture, self.like.dtype, self.tokens, self.tight or tight)


def _is_tight(member: Member) -> bool:
    adapters = member.adapters
    large = any(lora_A.shape[0] > LARGEST_SHARED_RANK for lora_A in adapters.lora_A)
    # rows that begin anywhere are read element by element
    unaligned = any(size % 16 != 0 for size in member.weight.shape)
    return large or unaligned or len(adapters) > 1 or any(adapters.dropout_p)


def _is_wide(slots: Slots) -> bool:
    """Whether the sums of all slots side by side leave few registers to the rest of a program."""
    return slots.padded_rank * len(slots) > _WIDE


_WIDE = 96


def _operand(call: _Call, path: Path, weights: Sequence[Weight]) -> tuple[WeightArguments, Tile]:
    """The weights as our product takes them, codes or decoded, and its tile."""
    if path == Path.STAGED:
        return weight_arguments(_dense(weights, call.like)), call.tile("dense")
    return weight_arguments(weights), call.tile("fused")


def _dense(weights: Sequence[Weight], like: Tensor) -> Sequence[Tensor]:
    """Weights in the dtype of ``like``: dense ones as they are or cast, codes decoded into the scratch buffer."""
    if isinstance(weights[0], Tensor):
        return [weight.to(like.dtype) for weight in weights if isinstance(weight, Tensor)]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    outs = scratch_matrices(like, tuple(weight.shape[0] for weight in quantized), quantized[0].shape[1])
    dequantize_group(quantized, outs)
    return outs


def _unit_stride(matrix: Tensor) -> Tensor:
    if matrix.is_neg():
        matrix = matrix.detach().resolve_neg()
    return matrix if matrix.stride(1) == 1 else matrix.detach().contiguous()


def _uniform(members: Sequence[Member], grads: Sequence[Tensor | None] | None = None) -> list[tuple[int, int]]:
    """Runs [first, last) of at most three members that can share a launch."""
    if len(members) == 1:
        return [(0, 1)]
    keys = [
        (
            weight_kind(member.weight),
            len(member.adapters),
            member.bias is None,
            None if member.bias is None else member.bias.dtype,
            {tensor.dtype for tensor in member.adapters.lora_A},
            {tensor.dtype for tensor in member.adapters.lora_B},
            grads is not None and getattr(grads[number], "dtype", None),
        )
        for number, member in enumerate(members)
    ]
    runs: list[tuple[int, int]] = []
    for number, key in enumerate(keys):
        if runs and keys[runs[-1][0]] == key and number - runs[-1][0] < _LARGEST_GROUP:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


_LARGEST_GROUP = 3


def _fits_few(slots: Slots, members: int) -> bool:
    """Whether one launch computes h beside the product: one adapter per member, of a rank that fits the registers."""
    return not len(slots) or (len(slots) == members and slots.padded_rank <= LARGEST_SHARED_RANK)


def _adapter_launches(slots: Slots, members: int) -> list[Slots]:
    return launches_of(slots, members) if len(slots) else []


def _one_launch_or_each(slots: Slots) -> list[list[int]]:
    """Which slots share a launch: all, or each its own where their rank is large."""
    everyone = list(range(len(slots)))
    return [everyone] if slots.padded_rank <= LARGEST_SHARED_RANK else [[number] for number in everyone]


def _skinny_launches(slots: Slots, members: int) -> list[Slots]:
    return [some.only(chosen) for some in _adapter_launches(slots, members) for chosen in _one_launch_or_each(some)]


@dataclass(frozen=True)
class _AdapterGradients:
    """dA and dB of every adapter of every member; ``None`` where nobody asked."""

    members: Sequence[Member]
    need_lora: Sequence[Sequence[bool]]
    grad_A: list[list[Tensor | None]]
    grad_B: list[list[Tensor | None]]

    @staticmethod
    def of(members: Sequence[Member], need_lora: Sequence[Sequence[bool]]) -> _AdapterGradients:
        empty: list[list[Tensor | None]] = [[None] * len(member.adapters) for member in members]
        return _AdapterGradients(members, need_lora, empty, [list(row) for row in empty])

    def new_a(self, index: int, numbers: range) -> list[Tensor]:
        return [self._new(number, index, self.members[number].adapters.lora_A, self.grad_A, 0) for number in numbers]

    def new_b(self, index: int, numbers: range) -> list[Tensor]:
        return [
            self._new(
                number, index, self.members[number].adapters.lora_B, self.grad_B, len(self.members[number].adapters)
            )
            for number in numbers
        ]

    def fill_zeros(self, numbers: range) -> None:
        for number in numbers:
            for index in range(len(self.members[number].adapters)):
                self.new_a(index, range(number, number + 1))[0].zero_()
                self.new_b(index, range(number, number + 1))[0].zero_()

    def _new(
        self, number: int, index: int, factors: Sequence[Tensor], table: list[list[Tensor | None]], offset: int
    ) -> Tensor:
        """Memory for one gradient; it enters the table only if it was asked for."""
        factor = factors[index]
        gradient = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
        if self.need_lora[number][offset + index]:
            table[number][index] = gradient
        return gradient
