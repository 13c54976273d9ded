"""Causal attention of the shape of SmolLM2-135M's blocks, forward and backward, beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.bench import peers
from peftkern.bench.case import Case
from peftkern.ops import attention

_TOLERANCES = {torch.float32: peers.FLOAT32_TOLERANCE, torch.bfloat16: peers.BFLOAT16_TOLERANCE}


def setup_attention(
    dtype: torch.dtype, batch: int = 4, heads: int = 9, kv_heads: int = 3, tokens: int = 256, head_dim: int = 64
) -> Case:
    """Both sides read views of [batch, tokens, heads, head_dim], as the blocks of transformers hand them over."""
    generator = torch.Generator().manual_seed(0)

    def states(count: int) -> Tensor:
        values = torch.randn(batch, tokens, count, head_dim, generator=generator).to(dtype)
        return values.transpose(1, 2).requires_grad_()

    leaves = (states(heads), states(kv_heads), states(kv_heads))
    grad = states(heads).detach()

    def ours() -> tuple[Tensor, ...]:
        out = attention(*leaves, causal=True)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def theirs() -> tuple[Tensor, ...]:
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(*leaves, is_causal=True, enable_gqa=True)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def check() -> None:
        pairs = zip(ours(), theirs(), strict=True)
        names = ("output", "query", "key", "value")
        peers.check_agreement(dict(zip(names, pairs, strict=True)), _TOLERANCES[dtype])

    sizes = f"{batch} x {tokens}, {heads} heads over {kv_heads}, head_dim {head_dim}"
    return Case(f"{sizes}, {str(dtype).removeprefix('torch.')}", ours, theirs, check)


def cases() -> Iterator[Case]:
    """Cases of ``attention-smollm2``."""
    for dtype in (torch.float32, torch.bfloat16):
        yield setup_attention(dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield setup_attention(dtype, batch=1, heads=8, kv_heads=2, tokens=2048, head_dim=128)
