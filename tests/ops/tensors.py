"""Tensors that are hard on quantizers."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from same_bits import DTYPES
from torch import Tensor

from peftkern.formats import BLOCK_SIZES

SHAPES = [(4, 128), (128, 64), (7, 80), (3, 33), (5, 4096), (3, 1040), (1, 1), (70,), (2, 3, 96), ()]
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For tests that take the ``backend`` fixture: it means the same for each example."""


@st.composite
def tensors(draw: st.DrawFn, dimensions: int | None = None) -> Tensor:
    """Up to a few blocks of values between denormal and huge, some zero, in any layout."""
    count = draw(st.integers(1, 3)) if dimensions is None else dimensions
    shape = [draw(st.integers(1, 9)) for _ in range(count - 1)] + [draw(st.integers(1, 700))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator)
    if draw(st.booleans()):  # on a coarse grid: values on and near thresholds, equal maxima
        values = (values * 8).round() / 8
    magnitude = draw(st.sampled_from([0, 0, -3, 4, -30, -40, -44, 35]))
    values *= 10.0**magnitude if magnitude > -40 else torch.tensor(10.0**magnitude, dtype=torch.float64)
    values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    limit = 3e38 if (dtype := draw(st.sampled_from(DTYPES))) != torch.float16 else 65504.0
    values = values.clamp(-limit, limit).to(dtype)
    return values.transpose(0, -1) if draw(st.booleans()) else values


block_sizes = st.sampled_from(BLOCK_SIZES)
