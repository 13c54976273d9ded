"""Attention on the CPU: prepares addresses and strides for ``csrc/cpu/isa/attention.inl.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.ops.attention import Gradients, empty_output


def _supports(query: Tensor, _key: Tensor, _value: Tensor, mask: Tensor | None, *_rest: Any) -> str | None:
    if mask is not None and mask.dtype == torch.float64:
        return "torch.float64 masks"
    return cpu.supports_values(query)


def _supports_backward(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str | None:
    return _supports(query, key, value, rest[2])


@registry.register("attention", "cpu", supports=_supports)
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`peftkern.ops.attention.attention_reference`."""
    out = empty_output(query)
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, logsumexp
    # what follows may be copies, which have to live as long as the call
    query, key, value = (cpu.adjacent(x) for x in (query, key, value))
    arguments = _arguments(query, key, value, out, logsumexp, mask, causal, scale)
    cpu.native.attention(cpu.chosen_isa(), arguments, torch.get_num_threads())
    return out, logsumexp


@registry.register("attention_backward", "cpu", supports=_supports_backward)
def attention_backward(
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
    """See :func:`peftkern.ops.attention.attention_backward_reference`."""
    needs = ((query, need_query), (key, need_key), (value, need_value))
    grad_query, grad_key, grad_value = (empty_output(x) if need else None for x, need in needs)
    if grad.numel() == 0:
        for gradient in (grad_query, grad_key, grad_value):
            if gradient is not None:
                gradient.zero_()
        return grad_query, grad_key, grad_value
    grad, query, key, value, out = (cpu.adjacent(x) for x in (grad, query, key, value, out))
    cpu.native.attention_backward(
        cpu.chosen_isa(),
        _arguments(query, key, value, out, logsumexp.contiguous(), mask, causal, scale),
        *(_states_tuple(x) for x in (grad, grad_query, grad_key, grad_value)),
        torch.get_num_threads(),
    )
    return grad_query, grad_key, grad_value


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Any, ...]:
    batch, heads, queries, head_dim = query.shape
    sizes = (batch, heads, key.shape[1], queries, key.shape[2], head_dim)
    return (
        *(_states_tuple(x) for x in (query, key, value, out)),
        logsumexp.data_ptr(),
        _mask_tuple(mask, (batch, heads, queries, key.shape[2])),
        cpu.values_tuple(query)[1],
        sizes,
        scale,
        causal,
    )


def _states_tuple(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0, 0)) if x is None else (x.data_ptr(), x.stride()[:3])


def _mask_tuple(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, bool, int, tuple[int, ...]]:
    if mask is None:
        return 0, False, 0, (0, 0, 0, 0)
    boolean = mask.dtype == torch.bool
    return mask.data_ptr(), boolean, 0 if boolean else cpu.values_tuple(mask)[1], mask.expand(shape).stride()
