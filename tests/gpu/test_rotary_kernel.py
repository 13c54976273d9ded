"""Rotary embeddings on the device, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE

from peftkern.backends import registry
from peftkern.ops.rotary import rotary_reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
SIZES = [(2, 3, 1, 5, 8, 8), (1, 4, 2, 3, 64, 32), (2, 1, 1, 2, 10, 6), (1, 2, 1, 4, 6, 2)]
"""batch, heads of q, of k, tokens, head_dim, rotary_dim"""


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_turns_there_and_back(dtype: torch.dtype, interleaved: bool) -> None:
    for batch, q_heads, k_heads, tokens, head_dim, rotary_dim in SIZES:
        torch.manual_seed(0)
        states = [torch.randn(batch, tokens, heads, head_dim).to(dtype) for heads in (q_heads, k_heads)]
        angles = [torch.randn(1, tokens, rotary_dim).to(dtype) for _ in range(2)]
        for inverse in (False, True):
            for used in (states, states[1:]):
                given = [x.to(DEVICE).transpose(1, 2) for x in used]
                turned = registry.run(
                    "rotary", given, *(a.to(DEVICE) for a in angles), interleaved, inverse, backend="triton"
                )
                exact = [x.double().transpose(1, 2) for x in used], *(a.double() for a in angles)
                for result, expected in zip(turned, rotary_reference(*exact, interleaved, inverse), strict=True):
                    error = (result.cpu().double() - expected).norm()
                    assert error <= TOLERANCE[dtype] * expected.norm()
                    assert result.dtype == dtype


def test_any_strides() -> None:
    torch.manual_seed(1)
    q = torch.randn(2, 8, 3, 5).to(DEVICE).transpose(1, 3)  # head_dim is not the last in memory
    k = torch.randn(2, 2, 3, 8).to(DEVICE)
    cos, sin = (torch.randn(2, 8, 3).to(DEVICE).transpose(1, 2)[..., :6] for _ in range(2))
    turned = registry.run("rotary", (q, k), cos, sin, False, False, backend="triton")
    for result, expected in zip(turned, rotary_reference((q, k), cos, sin, False, False), strict=True):
        torch.testing.assert_close(result, expected)
