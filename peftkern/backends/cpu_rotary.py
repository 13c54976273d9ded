"""Rotary embeddings on the CPU: prepares addresses and strides for ``csrc/cpu/isa/rotary.inl.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import cpu, registry


def _supports(states: Sequence[Tensor], cos: Tensor, *_rest: Any) -> str | None:
    objections = (cpu.supports_values(tensor) for tensor in (*states, cos))
    return next((objection for objection in objections if objection is not None), None)


@registry.register("rotary", "cpu", supports=_supports)
def rotary(states: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> list[Tensor]:
    """See :func:`peftkern.ops.rotary.rotary_reference`."""
    results = [torch.empty_like(x) for x in states]
    if not any(x.numel() for x in states):
        return results
    # what follows may be copies, which have to live as long as the call
    inputs = [cpu.adjacent(x) for x in states]
    outputs = [
        out if cpu.is_adjacent(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device) for out in results
    ]
    cos, sin = cpu.adjacent(cos), cpu.adjacent(sin)
    batch, _, tokens, head_dim = states[0].shape
    cpu.native.rotary(
        cpu.chosen_isa(),
        [_states_tuple(x, out) for x, out in zip(inputs, outputs, strict=True)],
        _angles_tuple(cos),
        _angles_tuple(sin),
        cpu.values_tuple(inputs[0])[1],
        cpu.values_tuple(cos)[1],
        (batch, tokens, head_dim, cos.shape[-1]),
        interleaved,
        inverse,
        torch.get_num_threads(),
    )
    for result, out in zip(results, outputs, strict=True):
        if out is not result:
            result.copy_(out)
    return results


def _states_tuple(x: Tensor, out: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), out.data_ptr(), x.shape[1], x.stride()[:3], out.stride()[:3]


def _angles_tuple(angles: Tensor) -> tuple[int, tuple[int, int]]:
    # one row for the whole batch
    return angles.data_ptr(), (angles.stride(0) if angles.shape[0] > 1 else 0, angles.stride(1))
