"""Rotary embeddings; formulas and shapes are in :mod:`peftkern.ops.rotary`. Arithmetic is in float32.

One program turns one head of one token, of queries or of keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.launch import Traffic, launch


@triton.jit
def _turn(
    x,
    out,
    cos,
    sin,
    head_dim,
    rotary_dim,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    half = rotary_dim // 2
    pair = tl.arange(0, BLOCK)
    mask = pair < half
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + half
    a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + first, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + second, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + first, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + second, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        turned_a = a * cos_a + b * sin_b
        turned_b = b * cos_b - a * sin_a
    else:
        turned_a = a * cos_a - b * sin_a
        turned_b = b * cos_b + a * sin_b
    tl.store(out + first, turned_a.to(out.dtype.element_ty), mask=mask)
    tl.store(out + second, turned_b.to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        behind = rotary_dim + tl.arange(0, REST)
        tl.store(out + behind, tl.load(x + behind, mask=behind < head_dim, other=0.0), mask=behind < head_dim)


@triton.jit
def rotary_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_heads,
    tokens,
    head_dim,
    rotary_dim,
    q_strides,
    k_strides,
    q_out_strides,
    k_out_strides,
    cos_strides,
    sin_strides,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1).to(tl.int64)
    cos += batch * cos_strides[0] + token * cos_strides[1]
    sin += batch * sin_strides[0] + token * sin_strides[1]
    if head < q_heads:
        q += batch * q_strides[0] + head * q_strides[1] + token * q_strides[2]
        q_out += batch * q_out_strides[0] + head * q_out_strides[1] + token * q_out_strides[2]
        _turn(q, q_out, cos, sin, head_dim, rotary_dim, INTERLEAVED, INVERSE, BLOCK, REST)
    else:
        head -= q_heads
        k += batch * k_strides[0] + head * k_strides[1] + token * k_strides[2]
        k_out += batch * k_out_strides[0] + head * k_out_strides[1] + token * k_out_strides[2]
        _turn(k, k_out, cos, sin, head_dim, rotary_dim, INTERLEAVED, INVERSE, BLOCK, REST)


def _adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rotary(states: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> list[Tensor]:
    """See :func:`peftkern.ops.rotary.rotary_reference`."""
    results = [torch.empty_like(x) for x in states]
    if not any(x.numel() for x in states):
        return results
    inputs = [_adjacent(x) for x in states]
    outputs = [out if out.stride(-1) == 1 else out.contiguous() for out in results]
    cos, sin = _adjacent(cos), _adjacent(sin)
    batch, _, tokens, head_dim = inputs[0].shape
    rotary_dim = cos.shape[-1]
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    launch(
        rotary_kernel,
        (batch * tokens, sum(x.shape[1] for x in inputs)),
        inputs[0],
        inputs[-1],
        outputs[0],
        outputs[-1],
        cos,
        sin,
        inputs[0].shape[1],
        tokens,
        head_dim,
        rotary_dim,
        *(tensor.stride()[:3] for tensor in (inputs[0], inputs[-1], outputs[0], outputs[-1])),
        *((angles.stride(0) if angles.shape[0] > 1 else 0, angles.stride(1)) for angles in (cos, sin)),
        traffic=lambda: Traffic((*inputs, cos, sin), tuple(outputs), flops=3 * sum(x.numel() for x in inputs)),
        num_warps=1,
        num_stages=1,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        BLOCK=max(1, 1 << max(half - 1, 0).bit_length()),
        REST=0 if rest == 0 else 1 << (rest - 1).bit_length(),
    )
    for result, out in zip(results, outputs, strict=True):
        if out is not result:
            result.copy_(out)
    return results
