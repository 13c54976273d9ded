"""Frozen linear layers with LoRA adapters that share their input, as one operation: q, k and v, or gate and up.

    yᵢ = x Wᵢᵀ + Σⱼ hᵢⱼ Bᵢⱼᵀ + bᵢ          member i, with its adapters j
    dx = Σᵢ dxᵢ                            one sum in float32, rounded once

Each member is what :mod:`peftkern.ops.lora_linear` says, with the same shapes and gradients and a dropout seed of its
own. What is kept for the backward pass is x, once, where an A is trained, the h of all members side by side ([tokens,
Σr], float32) where a B is, and the seeds. A backend without a form of its own for a group runs the members one after
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops import dropout
from peftkern.ops.lora_linear import (
    Adapters,
    Weight,
    as_matrix,
    bias_gradient,
    check_adapters,
    check_backward,
    check_call,
    check_versions,
    compute_dtype,
    flatten_weight,
    in_autocast_dtype,
    inner_products,
    is_plain_eager,
    lora_linear,
    lora_linear_backward_reference,
    lora_linear_reference,
    unflatten_weight,
    weight_tensors,
    weight_versions,
)

Gradients = tuple[Tensor | None, list[list[Tensor | None]], list[list[Tensor | None]]]
"""Of x, and of every A and every B by member; ``None`` where none was asked for."""


@dataclass(frozen=True)
class Member:
    """One layer of a group: its weight [out, in], its active adapters and its bias [out]."""

    weight: Weight
    adapters: Adapters
    bias: Tensor | None


def splits(members: Sequence[Member]) -> list[slice]:
    """Which columns of h and g belong to each member."""
    ranks = (sum(lora_A.shape[0] for lora_A in member.adapters.lora_A) for member in members)
    return [slice(begin, end) for begin, end in pairwise([0, *accumulate(ranks)])]


def lora_linear_group(x: Tensor, members: Sequence[Member], *, backend: str | None = None) -> list[Tensor]:
    """The outputs of layers that share ``x``: equal to one `lora_linear` after another, each rounding included.

    Only the gradient of ``x`` differs: it is rounded once instead of once for each member. Seeds are drawn in the order
    of the members, so dropout drops what separate calls in that order would. Under ``torch.compile``, and where no
    backend has a form for the whole group, it is separate calls.

    Args:
        x: [..., in], as for `lora_linear`.
        members: at least one; a seed in their adapters is not used.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        [..., out] of each member, in the dtype of x, or in autocast's dtype under autocast. No two share memory.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `lora_linear` does; ``members`` is empty.
    """
    together = run_as_one(x, members, backend)
    return [_alone(x, member, backend) for member in members] if together is None else together


def run_as_one(x: Tensor, members: Sequence[Member], backend: str | None = None) -> list[Tensor] | None:
    """`lora_linear_group`, or ``None`` where it would be separate calls."""
    members = _checked(x, members)
    x = in_autocast_dtype(x)
    if backend_for(x, members, backend) is None:
        return None
    members = [Member(member.weight, _with_seed(member.adapters), member.bias) for member in members]
    lora = (factor for member in members for factor in (*member.adapters.lora_A, *member.adapters.lora_B))
    return list(_apply(x, members, backend, *(member.bias for member in members), *lora))


def backend_for(x: Tensor, members: Sequence[Member], backend: str | None = None) -> str | None:
    """Name of the backend that runs these members as one, or ``None``; x is [..., in] in the dtype of the product."""
    if torch.compiler.is_compiling():  # a graph must not depend on what the table of backends holds while tracing
        return None
    try:
        choice = registry.choose("lora_linear_group", as_matrix(x), members, backend=backend)
    except registry.BackendError:  # of a forced backend; `lora_linear` says it if that cannot run a member either
        return None
    return choice.backend if choice.backend != "reference" else None


def is_elsewhere(x: Tensor, members: Sequence[Member]) -> bool:
    """Whether all backends with a form for groups are for other devices, whatever the members and their number."""
    # on the meta device the answer changes: kernels are counted there at times
    if x.is_meta or registry.forced_backend() is not None:
        return False
    choice = registry.choose("lora_linear_group", as_matrix(x), members)
    return choice.backend == "reference" and choice.reason == "first choice"


def _alone(x: Tensor, member: Member, backend: str | None) -> Tensor:
    adapters = member.adapters
    lora = (adapters.lora_A, adapters.lora_B, adapters.scaling)
    return lora_linear(x, member.weight, *lora, member.bias, adapters.dropout_p, backend=backend)


def _with_seed(adapters: Adapters) -> Adapters:
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    return Adapters(adapters.lora_A, adapters.lora_B, adapters.scaling, adapters.dropout_p, seed)


# ---- checks


def _checked(x: Any, members: Any) -> list[Member]:
    """``members`` with lists where sequences of any kind were given."""
    if not members:
        raise ValueError("lora_linear_group: members must hold at least one layer")
    return [check_member("lora_linear_group", x, member) for member in members]


def check_member(operation: str, x: Any, member: Any) -> Member:
    """``member``, which multiplies x, with lists where sequences of any kind were given; raises as `lora_linear`."""
    if not isinstance(member, Member):
        raise TypeError(f"{operation}: its layers must be Member objects, got {type(member).__name__}")
    given = member.adapters
    adapters = check_adapters(given.lora_A, given.lora_B, given.scaling, given.dropout_p)
    check_call(x, member.weight, adapters, member.bias)
    return Member(member.weight, adapters, member.bias)


# ---- reference


@registry.register("lora_linear_group", "reference")
def lora_linear_group_reference(x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Tensor]:
    """Forward in plain PyTorch. x is [tokens, in]; returns every y and the h of all members side by side."""
    results = [lora_linear_reference(x, member.weight, member.adapters, member.bias) for member in members]
    return [y for y, _ in results], torch.cat([h for _, h in results], dim=1)


@registry.register("lora_linear_group_backward", "reference")
def lora_linear_group_backward_reference(
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    members: Sequence[Member],
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[Sequence[bool]],
) -> Gradients:
    """Backward in plain PyTorch.

    grads are [tokens, out], at least one of them; ``None`` for a member whose output had no part in the loss: it adds
    nothing, and its A and B get ``None``. x may be ``None`` where no A needs a gradient; ``need_lora`` holds, for each
    member, the flags of every A, then those of every B.
    """
    dtype = next(grad.dtype for grad in grads if grad is not None)
    grad_x: Tensor | None = None
    grad_A, grad_B = _no_gradients(members), _no_gradients(members)
    for index, (grad, member, columns) in enumerate(zip(grads, members, splits(members), strict=True)):
        if grad is None:
            continue
        # in the wider dtype nothing is rounded before the sum is complete
        grad = grad.to(compute_dtype(grad))
        part, grad_A[index], grad_B[index] = lora_linear_backward_reference(
            grad, x, member.weight, member.adapters, h[:, columns], need_x, need_lora[index]
        )
        grad_x = part if grad_x is None or part is None else grad_x + part
    return None if grad_x is None else grad_x.to(dtype), grad_A, grad_B


def _no_gradients(members: Sequence[Member]) -> list[list[Tensor | None]]:
    return [[None] * len(member.adapters) for member in members]


# ---- autograd


class _LoraLinearGroup(torch.autograd.Function):
    """``tensors`` is every bias (``None`` where there is none), then for each member every A and every B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: list[Member], backend: str | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        y, h = _run_forward(as_matrix(x), members, backend)
        need_x, need_bias, need_lora = _needs(ctx, members)
        need_A = any(any(flags[: len(flags) // 2]) for flags in need_lora)
        need_B = any(any(flags[len(flags) // 2 :]) for flags in need_lora)
        # not among the saved tensors, whose hooks would copy or offload weights that stay where they are anyway
        ctx.call = [(m.weight, weight_versions(m.weight), m.adapters.scaling, m.adapters.dropout_p) for m in members]
        ctx.options = (x.shape, backend)
        seeds = [member.adapters.seed for member in members]
        ctx.save_for_backward(x if need_A else None, h if need_B else None, *seeds, *tensors[len(members) :])
        ctx.set_materialize_grads(False)
        # not views in autograd's eyes: the output of an operator may be modified in place, one of several views may not
        outputs = [torch.ops.aten._unsafe_view(part, [*x.shape[:-1], part.shape[-1]]) for part in y]
        needs = [need_x or need or any(flags) for need, flags in zip(need_bias, need_lora, strict=True)]
        ctx.mark_non_differentiable(*(part for part, need in zip(outputs, needs, strict=True) if not need))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        shape, backend = ctx.options
        known = next((grad for grad in grads if grad is not None), None)
        if known is None:
            return (None,) * len(ctx.needs_input_grad)
        x, members, h = _saved(ctx, known)
        need_x, need_bias, need_lora = _needs(ctx, members)
        parts = [None if grad is None else as_matrix(grad.resolve_neg()) for grad in grads]
        biases = [
            None if part is None or not need else bias_gradient(part)
            for part, need in zip(parts, need_bias, strict=True)
        ]
        gradients: Gradients = None, _no_gradients(members), _no_gradients(members)
        if any(part is not None for part in parts) and (need_x or any(map(any, need_lora))):
            gradients = _run_backward(parts, x, members, h, need_x, need_lora, backend)
        grad_x, grad_A, grad_B = gradients
        lora = _chained(grad_A, grad_B)
        return None if grad_x is None else grad_x.view(shape), None, None, *biases, *lora


_apply = cast(Callable[..., tuple[Tensor, ...]], _LoraLinearGroup.apply)


def _needs(ctx: Any, members: Sequence[Member]) -> tuple[bool, list[bool], list[list[bool]]]:
    """Whether x, every bias, and every A and B of each member need a gradient."""
    need_x, _members, _backend, *flags = ctx.needs_input_grad
    return need_x, flags[: len(members)], _by_member(flags[len(members) :], [len(m.adapters) for m in members])


def _by_member(values: Sequence[Any], adapters: Sequence[int]) -> list[list[Any]]:
    """``values`` of every A and every B, in lists of one member's; ``adapters`` says how many it has."""
    ends = [0, *accumulate(2 * count for count in adapters)]
    return [list(values[begin:end]) for begin, end in pairwise(ends)]


def _chained(lora_A: Sequence[Sequence[Any]], lora_B: Sequence[Sequence[Any]]) -> list[Any]:
    """The way back from :func:`_by_member`."""
    return [value for both in zip(lora_A, lora_B, strict=True) for factors in both for value in factors]


def _saved(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Member], Tensor]:
    """x as a matrix, the members without their biases, and h; ``grad`` is of any output."""
    x, h, *tensors = ctx.saved_tensors
    seeds, factors = tensors[: len(ctx.call)], tensors[len(ctx.call) :]
    lora = _by_member(factors, [len(scaling) for _weight, _versions, scaling, _dropout_p in ctx.call])
    members = []
    for seed, both, (weight, versions, scaling, dropout_p) in zip(seeds, lora, ctx.call, strict=True):
        check_versions(weight, versions)
        adapters = Adapters(both[: len(scaling)], both[len(scaling) :], scaling, dropout_p, seed)
        members.append(Member(weight, adapters, None))
    if h is None:  # no B is trained, and nothing reads it
        h = torch.cat([inner_products(None, grad, member.adapters) for member in members], dim=1)
    return None if x is None else as_matrix(x), members, h


def _run_forward(x: Tensor, members: Sequence[Member], backend: str | None) -> tuple[list[Tensor], Tensor]:
    biases = (member.bias for member in members if member.bias is not None)
    if is_plain_eager((x, *_tensors(members), *biases)):
        y, h = registry.run("lora_linear_group", x, members, backend=backend)
    else:
        y, h = torch.ops.peftkern.lora_linear_group(x, *_flatten(members), backend)
    return y, h


def _run_backward(
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    members: Sequence[Member],
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[Sequence[bool]],
    backend: str | None,
) -> Gradients:
    given = [tensor for tensor in (*grads, x, h) if tensor is not None]
    if is_plain_eager((*given, *_tensors(members))):
        call = (grads, x, members, h, need_x, need_lora)
        gradients: Gradients = registry.run("lora_linear_group_backward", *call, backend=backend)
        return gradients
    flags = [flag for member_flags in need_lora for flag in member_flags]
    found = iter(torch.ops.peftkern.lora_linear_group_backward(grads, x, *_flatten(members), h, need_x, flags, backend))
    grad_x = next(found) if need_x else None
    lora = [[next(found) if flag else None for flag in flags] for flags in _wanted(grads, need_lora)]
    halves = [len(factors) // 2 for factors in lora]
    grad_A = [factors[:half] for factors, half in zip(lora, halves, strict=True)]
    grad_B = [factors[half:] for factors, half in zip(lora, halves, strict=True)]
    return grad_x, grad_A, grad_B


def _tensors(members: Sequence[Member]) -> Iterator[Tensor]:
    for member in members:
        yield from (*weight_tensors(member.weight), *member.adapters.lora_A, *member.adapters.lora_B)


def _wanted(grads: Sequence[Tensor | None], need_lora: Sequence[Sequence[bool]]) -> list[list[bool]]:
    """The flags of ``need_lora`` that a gradient can answer."""
    return [[grad is not None and flag for flag in flags] for grad, flags in zip(grads, need_lora, strict=True)]


# ---- operators, for whatever watches them; autograd is the function's above

_WEIGHT_ARGUMENTS = 9
_MEMBER_ARGUMENTS = 16
_SCHEMA = (
    "Tensor[] packed, Tensor?[] scales, Tensor?[] scales_absmax, Tensor?[] scales_offset, str[] format, "
    "int[] block_size, int[] scales_block_size, SymInt[] out_features, SymInt[] in_features, "
    "Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] dropout_p, int[] adapters, Tensor?[] seed, "
    "Tensor?[] bias"
)
"""Weights, seeds and biases by member; the adapters of all members one after another, ``adapters`` of each."""


def _flatten(members: Sequence[Member]) -> tuple[list[Any], ...]:
    weights = zip(*(flatten_weight(member.weight) for member in members), strict=True)
    adapters = [member.adapters for member in members]
    fields = ("lora_A", "lora_B", "scaling", "dropout_p")
    chained = ([value for each in adapters for value in getattr(each, field)] for field in fields)
    seeds, biases = [each.seed for each in adapters], [member.bias for member in members]
    return *map(list, weights), *chained, [len(each) for each in adapters], seeds, biases


def _unflatten(dtype: torch.dtype, arguments: Sequence[Any]) -> list[Member]:
    weights = [unflatten_weight(dtype, weight) for weight in zip(*arguments[:_WEIGHT_ARGUMENTS], strict=True)]
    lora_A, lora_B, scaling, dropout_p, counts, seeds, biases = arguments[_WEIGHT_ARGUMENTS:]
    members = []
    for index, (begin, end) in enumerate(pairwise([0, *accumulate(counts)])):
        mine = slice(begin, end)
        adapters = Adapters(lora_A[mine], lora_B[mine], scaling[mine], dropout_p[mine], seeds[index])
        members.append(Member(weights[index], adapters, biases[index]))
    return members


@torch.library.custom_op(
    "peftkern::lora_linear_group",
    mutates_args=(),
    schema=f"(Tensor x, {_SCHEMA}, str? backend) -> (Tensor[], Tensor)",
)
def _forward_operator(x: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
    members, backend = _unflatten(x.dtype, arguments[:_MEMBER_ARGUMENTS]), arguments[-1]
    for member in members:
        check_call(x, member.weight, member.adapters, member.bias)
    y, h = registry.run("lora_linear_group", x, members, backend=backend)
    return y, h


@_forward_operator.register_fake
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
    out_features, lora_A = arguments[_WEIGHT_ARGUMENTS - 2], arguments[_WEIGHT_ARGUMENTS]
    ranks = sum(factor.shape[0] for factor in lora_A)
    y = [x.new_empty(x.shape[0], features) for features in out_features]
    return y, x.new_empty(x.shape[0], ranks, dtype=compute_dtype(x))


@torch.library.custom_op(
    "peftkern::lora_linear_group_backward",
    mutates_args=(),
    schema=f"(Tensor?[] grads, Tensor? x, {_SCHEMA}, Tensor h, bool need_x, bool[] need_lora, str? backend) "
    "-> Tensor[]",
)
def _backward_operator(grads: list[Tensor | None], x: Tensor | None, *arguments: Any) -> list[Tensor]:
    dtype = next(grad.dtype for grad in grads if grad is not None)
    members = _unflatten(dtype, arguments[:_MEMBER_ARGUMENTS])
    h, need_x, flags, backend = arguments[_MEMBER_ARGUMENTS:]
    for grad, member, columns in zip(grads, members, splits(members), strict=True):
        if grad is not None:
            check_backward(grad, x, member.weight, member.adapters, h[:, columns])
    need_lora = _by_member(flags, [len(member.adapters) for member in members])
    call = (grads, x, members, h, need_x, need_lora)
    grad_x, grad_A, grad_B = registry.run("lora_linear_group_backward", *call, backend=backend)
    lora = _chained(grad_A, grad_B)
    return [gradient for gradient in (grad_x, *lora) if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(grads: list[Tensor | None], x: Tensor | None, *arguments: Any) -> list[Tensor]:
    given = next(grad for grad in grads if grad is not None)
    in_features = arguments[_WEIGHT_ARGUMENTS - 1][0]
    lora_A, lora_B, _scaling, _dropout_p, counts, *_ = arguments[_WEIGHT_ARGUMENTS:]
    _h, need_x, flags, _backend = arguments[_MEMBER_ARGUMENTS:]
    slices = [slice(begin, end) for begin, end in pairwise([0, *accumulate(counts)])]
    factors = [factor for mine in slices for factor in (*lora_A[mine], *lora_B[mine])]
    wanted = [flag for member_flags in _wanted(grads, _by_member(flags, counts)) for flag in member_flags]
    gradients = [factor.new_empty(factor.shape) for factor, flag in zip(factors, wanted, strict=True) if flag]
    return [given.new_empty(given.shape[0], in_features), *gradients] if need_x else gradients
