"""Small kernels whose compiled code has what the ahead-of-time report must find."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftkern.backends.triton.launch import Traffic, launch, recording
from peftkern.backends.triton.specializations import Specialization, specialize


@triton.jit
def multiply_kernel(
    x,
    weights,
    y,
    inner,
    strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    USE_DOT: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    steps = tl.arange(0, INNER)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, inner, INNER):
        left = tl.load(x + rows[:, None] * strides[0] + first + steps[None, :])
        right = tl.load(weights[0] + columns[:, None] * strides[1] + first + steps[None, :])
        if USE_DOT:
            total = tl.dot(left, tl.trans(right), total)
        else:
            total += tl.sum(left.to(tl.float32), 1)[:, None] * tl.sum(right.to(tl.float32), 1)[None, :]
    tl.store(y + rows[:, None] * COLUMNS + columns[None, :], total)


@triton.jit
def undefined_kernel(x, COUNT: tl.constexpr):
    tl.store(x + tl.arange(0, COUNT), tl.zeros((COUNT + 1,), tl.float32))


def multiply(
    rows: int = 64,
    columns: int = 64,
    inner: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
    row_stride: int = 4096,
    use_dot: bool = True,
) -> Specialization:
    """`multiply_kernel` as it is compiled for these sizes; sound with the defaults."""
    x = torch.empty(rows, row_stride, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(columns, row_stride, dtype=torch.bfloat16, device="meta")
    y = torch.empty(rows, columns, device="meta")
    with recording() as launches:
        launch(
            multiply_kernel,
            (1,),
            x,
            (weight,),
            y,
            4096,
            (x.stride(0), weight.stride(0)),
            traffic=lambda: Traffic((x, weight), (y,)),
            num_warps=num_warps,
            num_stages=num_stages,
            ROWS=rows,
            COLUMNS=columns,
            INNER=inner,
            USE_DOT=use_dot,
        )
    (found,) = launches
    return specialize("multiply", found.call)


def undefined() -> Specialization:
    """A kernel with an error in it."""
    x = torch.empty(16, device="meta")
    with recording() as launches:
        launch(undefined_kernel, (1,), x, traffic=lambda: Traffic((), (x,)), num_warps=1, num_stages=1, COUNT=16)
    return specialize("undefined", launches[0].call)
