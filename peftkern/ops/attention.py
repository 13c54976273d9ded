"""Scaled dot-product attention, forward and backward, without a matrix of all queries and keys in memory.

Of each query qᵢ against the keys kⱼ and values vⱼ of its head, with a mask Mᵢⱼ that is added to the scores,

    sᵢⱼ = scale qᵢ·kⱼ + Mᵢⱼ       Lᵢ = log Σⱼ exp(sᵢⱼ)       pᵢⱼ = exp(sᵢⱼ - Lᵢ)       oᵢ = Σⱼ pᵢⱼ vⱼ

and, with what arrives at the output, dO,

    dvⱼ = Σᵢ pᵢⱼ dOᵢ       dpᵢⱼ = dOᵢ·vⱼ       dsᵢⱼ = pᵢⱼ (dpᵢⱼ - dOᵢ·oᵢ)
    dqᵢ = scale Σⱼ dsᵢⱼ kⱼ       dkⱼ = scale Σᵢ dsᵢⱼ qᵢ

Scores are made for a block of queries and keys at a time, with a running maximum and sum in the forward pass, and again
from L in the backward pass: what is kept is q, k, v, o and L. A causal query sees the keys up to its own place. With
fewer heads of keys than of queries, neighbouring heads of queries share one, whose gradients are their sums.
Arithmetic, sums and the softmax are in float32 (float64 for float64 inputs), rounded once; where a CPU multiplies pairs
of bfloat16, p and ds are rounded to bfloat16 for the products with v, dO, k and q.

A query that sees no key (its row of the mask is false or minus infinity everywhere) gives zeros, L = -∞ and no
gradients, as PyTorch's own attention does.

Source: FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, Dao 2023 (arXiv:2307.08691),
sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.lora_linear import FLOAT_DTYPES, compute_dtype, is_plain_eager

LARGEST_HEAD_DIM = 256

Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention of queries to keys and values, as ``torch.nn.functional.scaled_dot_product_attention`` without dropout.

    Differentiable, once, in ``query``, ``key`` and ``value``; only what asks for a gradient gets one.

    Args:
        query: [batch, heads, queries, head_dim], float64, float32, bfloat16 or float16, any strides: a transposed view
            of [batch, queries, heads, head_dim] is read as it lies. head_dim is 1 to 256.
        key: [batch, kv_heads, keys, head_dim], of that dtype; kv_heads divides heads, and keys > 0.
        value: as the key.
        mask: [batch or 1, heads or 1, queries or 1, keys or 1]: bool, true where a query sees a key, or of any of these
            dtypes, added to the scores. Without gradient.
        causal: a query sees the keys up to its own place; as many queries as keys. May stand beside a mask.
        scale: factor of the scores; ``None`` stands for head_dim ** -0.5.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        [batch, heads, queries, head_dim] of the dtype of ``query``, whose memory is [batch, queries, heads, head_dim].
        A query that sees no key gives zeros.

    Raises:
        ValueError: shapes or devices do not fit, a tensor is sparse, or the mask asks for a gradient.
        TypeError: an argument is no tensor or has another dtype.
        BackendError: a forced backend cannot run the call.
    """
    _check(query, key, value, mask, causal)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = [tensor for tensor in (query, key, value, mask) if tensor is not None]
    if is_plain_eager(tensors):
        return _apply(query, key, value, mask, bool(causal), scale, backend)
    out: Tensor = torch.ops.peftkern.attention(query, key, value, mask, bool(causal), scale, backend)[0]
    return out


def _check(query: Any, key: Any, value: Any, mask: Any, causal: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
        if name == "mask" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"attention: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES and (name != "mask" or tensor.dtype != torch.bool):
            others = "bool, float64" if name == "mask" else "float64"
            raise TypeError(f"attention: {name} must be {others}, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"attention: {name} must be dense, got {tensor.layout}; use {name}.to_dense()")
        if tensor.device != query.device:
            raise ValueError(f"attention: {name} is on {tensor.device} and query on {query.device}; move one of them")
        if tensor.dim() != 4:
            raise ValueError(f"attention: {name} must have 4 dimensions, got {list(tensor.shape)}")
    if not key.dtype == value.dtype == query.dtype:
        raise TypeError(
            f"attention: key and value must have the dtype of query, {query.dtype}; got {key.dtype} and {value.dtype}"
        )
    _check_shapes(query, key, value, causal)
    if mask is not None:
        _check_mask(query, key, mask)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise ValueError(f"attention: head_dim must be from 1 to {LARGEST_HEAD_DIM}, got {head_dim}")
    if key.shape[0] != batch or key.shape[3] != head_dim or value.shape != key.shape:
        raise ValueError(
            f"attention: key and value must be [{batch}, kv_heads, keys, {head_dim}] to fit query; "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if keys == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"attention: there must be a key, and kv_heads must divide the {heads} heads of query; got key "
            f"{list(key.shape)}"
        )
    if causal and queries != keys:
        raise ValueError(
            f"attention: causal needs as many queries as keys, got {queries} and {keys}; pass a mask that says which "
            "key each query sees"
        )


def _check_mask(query: Tensor, key: Tensor, mask: Tensor) -> None:
    shape = (*query.shape[:3], key.shape[2])
    if any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"attention: mask must be {list(shape)}, or 1 in any place, got {list(mask.shape)}")
    if mask.requires_grad:
        raise ValueError("attention: mask gets no gradient; pass mask.detach()")


# ---- reference


@registry.register("attention", "reference")
def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Forward in plain PyTorch, in float32 (float64 for float64 inputs), with all scores in memory.

    Returns:
        The output, and the logsumexp of the scores, [batch, heads, queries] in float32 (float64).
    """
    scores = _scores(query, key, mask, causal, scale)
    logsumexp = torch.logsumexp(scores, -1)
    out = _weights(scores, logsumexp) @ _for_each_head(value, query)
    return empty_output(query).copy_(out), logsumexp


@registry.register("attention_backward", "reference")
def attention_backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> Gradients:
    """Backward in plain PyTorch: the gradients of query, key and value, or ``None``.

    Args:
        grad: what arrives at the output.
        out, logsumexp: as `attention_reference` returns them.
    """
    dtype = compute_dtype(query)
    grad_ = grad.to(dtype)
    weights = _weights(_scores(query, key, mask, causal, scale), logsumexp)
    grad_value = _sum_shared(weights.mT @ grad_, value) if need_value else None
    if not (need_query or need_key):
        return None, None, grad_value
    along = (grad_ * out.to(dtype)).sum(-1, keepdim=True)
    grad_scores = weights * (grad_ @ _for_each_head(value, query).mT - along) * scale
    grad_query = empty_output(query).copy_(grad_scores @ _for_each_head(key, query)) if need_query else None
    grad_key = _sum_shared(grad_scores.mT @ query.to(dtype), key) if need_key else None
    return grad_query, grad_key, grad_value


def empty_output(tensor: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] whose memory is [batch, tokens, heads, head_dim], uninitialised."""
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _for_each_head(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.to(compute_dtype(query)).repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _sum_shared(gradient: Tensor, tensor: Tensor) -> Tensor:
    batch, kv_heads, *rest = tensor.shape
    shared = gradient.shape[1] // kv_heads
    return empty_output(tensor).copy_(gradient.reshape(batch, kv_heads, shared, *rest).sum(2))


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (query.to(compute_dtype(query)) * scale) @ _for_each_head(key, query).mT
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hidden else scores + mask.to(scores.dtype)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _weights(scores: Tensor, logsumexp: Tensor) -> Tensor:
    return torch.exp(scores - logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf)[..., None])


# ---- eager calls


class _Attention(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        out, logsumexp = registry.run("attention", query, key, value, mask, causal, scale, backend=backend)
        ctx.call = (causal, scale, backend)
        ctx.save_for_backward(query, key, value, out, logsumexp, mask)
        return cast(Tensor, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        causal, scale, backend = ctx.call
        arguments = (grad.resolve_neg(), *ctx.saved_tensors, causal, scale, *ctx.needs_input_grad[:3])
        return *registry.run("attention_backward", *arguments, backend=backend), None, None, None, None


_apply = cast(Callable[..., Tensor], _Attention.apply)


# ---- operators


@torch.library.custom_op(
    "peftkern::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, str? backend) "
    "-> (Tensor, Tensor)",
)
def _operator(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    out, logsumexp = registry.run("attention", query, key, value, mask, causal, scale, backend=backend)
    return out, logsumexp


@_operator.register_fake
def _fake(query: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return empty_output(query), query.new_empty(query.shape[:3], dtype=compute_dtype(query))


@torch.library.custom_op(
    "peftkern::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor? mask, "
    "bool causal, float scale, bool need_query, bool need_key, bool need_value, str? backend) -> Tensor[]",
)
def _backward_operator(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    backend: str | None,
) -> list[Tensor]:
    arguments = (grad, query, key, value, out, logsumexp, mask, causal, scale, need_query, need_key, need_value)
    gradients = registry.run("attention_backward", *arguments, backend=backend)
    return [gradient for gradient in gradients if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> list[Tensor]:
    needs = arguments[5:8]
    return [empty_output(x) for x, need in zip((query, key, value), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, *ctx.call = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, mask)


def _backward(ctx: Any, grad: Tensor, _grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    causal, scale, backend = ctx.call
    needs = ctx.needs_input_grad[:3]
    arguments = (grad, *ctx.saved_tensors, causal, scale, *needs, backend)
    gradients = iter(torch.ops.peftkern.attention_backward(*arguments))
    return *(next(gradients) if need else None for need in needs), None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)
