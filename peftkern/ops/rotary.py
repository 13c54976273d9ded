"""Rotary embeddings: queries and keys turned by angles that grow with their position.

The first ``rotary_dim`` numbers of a head are pairs, (xᵢ, xᵢ₊ₕ) with h = rotary_dim / 2 or, interleaved, (x₂ᵢ, x₂ᵢ₊₁).
Of a pair (a, b) with the cosines and sines at its two places,

    a' = a cosₐ - b sinₐ          da = da' cosₐ + db' sin_b
    b' = b cos_b + a sin_b        db = db' cos_b - da' sinₐ

The backward pass is the turn back, by the same cosines and sines, which are all that is kept for it. The numbers behind
``rotary_dim`` stay as they are. Arithmetic is in float32 (float64 for float64 inputs) and rounded once.

Source: RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al. 2021 (arXiv:2104.09864), eq. 34.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.lora_linear import FLOAT_DTYPES, compute_dtype, is_plain_eager


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each token turned by its angles.

    Differentiable in ``q`` and ``k``.

    Args:
        q: [batch, heads, tokens, head_dim], float64, float32, bfloat16 or float16, any strides: a transposed view is
            read as it lies.
        k: the same with a number of heads of its own.
        cos, sin: [batch or 1, tokens, rotary_dim], of any of these dtypes; rotary_dim is even and at most head_dim.
            Without gradient.
        interleaved: pairs are neighbours (GPT-J, Cohere, GLM), not half of rotary_dim apart (Llama, GPT-NeoX).
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        q and k, turned, of their shapes and dtypes, with the strides of ``torch.empty_like``.

    Raises:
        ValueError: shapes or devices do not fit, a tensor is sparse, or ``cos`` or ``sin`` asks for a gradient.
        TypeError: an argument is no tensor or has another dtype.
        BackendError: a forced backend cannot run the call.
    """
    _check(q, k, cos, sin)
    if is_plain_eager((q, k, cos, sin)):
        return _apply(q, k, cos, sin, bool(interleaved), backend)
    turned_q, turned_k = torch.ops.peftkern.rotary([q, k], cos, sin, bool(interleaved), False, backend)
    return turned_q, turned_k


def _check(q: Any, k: Any, cos: Any, sin: Any) -> None:
    for name, value in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not isinstance(value, Tensor):
            raise TypeError(f"rotary: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"rotary: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
        if value.layout != torch.strided:
            raise ValueError(f"rotary: {name} must be dense, got {value.layout}; use {name}.to_dense()")
        if value.device != q.device:
            raise ValueError(f"rotary: {name} is on {value.device} and q on {q.device}; move one of them")
    if q.dim() != 4:
        raise ValueError(f"rotary: q must be [batch, heads, tokens, head_dim], got {list(q.shape)}")
    if k.dtype != q.dtype or sin.dtype != cos.dtype:
        raise TypeError(
            f"rotary: k must have the dtype of q, and sin that of cos; got {k.dtype} and {q.dtype}, "
            f"{sin.dtype} and {cos.dtype}"
        )
    batch, _, tokens, head_dim = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, tokens, head_dim):
        raise ValueError(f"rotary: k must be [{batch}, heads, {tokens}, {head_dim}] as q is, got {list(k.shape)}")
    for name, value in (("cos", cos), ("sin", sin)):
        if value.dim() != 3 or value.shape[0] not in (1, batch) or value.shape[1] != tokens:
            raise ValueError(f"rotary: {name} must be [1 or {batch}, {tokens}, rotary_dim], got {list(value.shape)}")
        if value.shape[2] % 2 != 0 or value.shape[2] > head_dim or value.shape != cos.shape:
            raise ValueError(
                f"rotary: cos and sin must have one shape, whose last size is even and at most {head_dim}; got "
                f"{list(cos.shape)} and {list(sin.shape)}"
            )
        if value.requires_grad:
            raise ValueError(f"rotary: {name} gets no gradient; pass {name}.detach()")


# ---- reference


@registry.register("rotary", "reference")
def rotary_reference(
    states: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> list[Tensor]:
    """In plain PyTorch, in float32 (float64 for float64 inputs).

    Args:
        states: each [batch, heads, tokens, head_dim].
        cos, sin: [batch or 1, tokens, rotary_dim].
        inverse: turn back, as the backward pass does.
    """
    return [_turned(x, cos, sin, interleaved, inverse) for x in states]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    dtype, rotary_dim = compute_dtype(x), cos.shape[-1]
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (
        _pairs(t.to(dtype), interleaved) for t in (x[..., :rotary_dim], cos[:, None], sin[:, None])
    )
    if inverse:
        turned = (a * cos_a + b * sin_b, b * cos_b - a * sin_a)
    else:
        turned = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    out = torch.empty_like(x)
    if interleaved:
        out[..., :rotary_dim] = torch.stack(turned, -1).flatten(-2)
    else:
        out[..., :rotary_dim] = torch.cat(turned, -1)
    out[..., rotary_dim:] = x[..., rotary_dim:]
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


# ---- eager calls


class _Rotary(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = (interleaved, backend)
        ctx.save_for_backward(cos, sin)
        return tuple(registry.run("rotary", (q, k), cos, sin, interleaved, False, backend=backend))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        interleaved, backend = ctx.call
        # the operator would be handed them without their negation
        wanted = [
            None if grad is None or not need else grad.resolve_neg()
            for grad, need in zip(grads, ctx.needs_input_grad[:2], strict=True)
        ]
        arrived = [grad for grad in wanted if grad is not None]
        turned = iter(registry.run("rotary", arrived, *ctx.saved_tensors, interleaved, True, backend=backend))
        grad_q, grad_k = (None if grad is None else next(turned) for grad in wanted)
        return grad_q, grad_k, None, None, None, None


_apply = cast(Callable[..., tuple[Tensor, Tensor]], _Rotary.apply)


# ---- operator


@torch.library.custom_op(
    "peftkern::rotary",
    mutates_args=(),
    schema="(Tensor[] states, Tensor cos, Tensor sin, bool interleaved, bool inverse, str? backend) -> Tensor[]",
)
def _operator(
    states: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str | None
) -> list[Tensor]:
    return list(registry.run("rotary", states, cos, sin, interleaved, inverse, backend=backend))


@_operator.register_fake
def _fake(states: list[Tensor], *_others: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in states]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, cos, sin, *ctx.call = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    interleaved, inverse, backend = ctx.call
    needs = ctx.needs_input_grad[0]
    wanted = [grad for grad, need in zip(grads, needs, strict=True) if need]
    turned = iter(torch.ops.peftkern.rotary(wanted, *ctx.saved_tensors, interleaved, not inverse, backend))
    return [next(turned) if need else None for need in needs], None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)
