"""Operations in the interpreter of Triton; ``test_executors.py`` runs this file with the stock one and the repaired."""

from __future__ import annotations

import os

import interpreter_repair
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

if os.environ.get("REPAIR_THE_INTERPRETER") == "1":
    interpreter_repair.apply()

SIDE = 32


@triton.jit
def compute(x: tl.tensor, y: tl.tensor, out: tl.tensor, SIDE: tl.constexpr, OPERATION: tl.constexpr) -> None:
    index = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    a, b = tl.load(x + index), tl.load(y + index)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "subtract":
        result = a - b
    elif OPERATION == "multiply":
        result = a * b
    elif OPERATION == "negate":
        result = -a
    elif OPERATION == "absolute":
        result = tl.abs(a)
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "where":
        result = tl.where(a > b, a, b + 1.0)
    elif OPERATION == "to float32":
        result = a.to(tl.float32)
    elif OPERATION == "from float32":
        result = (a.to(tl.float32) * b.to(tl.float32) / 3.0).to(tl.bfloat16)
    elif OPERATION == "from integer":
        result = tl.broadcast_to((tl.arange(0, SIDE) * 37)[None, :], (SIDE, SIDE)).to(tl.bfloat16)
    elif OPERATION == "dot":
        result = tl.dot(a, b)
    elif OPERATION == "sum":
        result = tl.broadcast_to(tl.sum(a.to(tl.float32), axis=1)[:, None], (SIDE, SIDE))
    elif OPERATION == "mask of a scalar":
        result = tl.load(x + index, mask=(index >= 0) & (tl.program_id(0) == 0))
    elif OPERATION == "sum in bfloat16":
        result = tl.broadcast_to(tl.sum(a, axis=1)[:, None], (SIDE, SIDE))
    else:
        result = tl.broadcast_to(tl.max(a, axis=1)[:, None], (SIDE, SIDE))
    tl.store(out + index, result)


EXPECTED = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "negate": lambda a, b: -a,
    "absolute": lambda a, b: a.abs(),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, b + 1.0),
    "to float32": lambda a, b: a.float(),
    "from float32": lambda a, b: (a.float() * b.float() / 3.0).bfloat16(),
    "from integer": lambda a, b: (torch.arange(SIDE) * 37).bfloat16().expand(SIDE, SIDE),
    "dot": lambda a, b: a.float() @ b.float(),
    "sum": lambda a, b: a.float().sum(1, keepdim=True).expand(SIDE, SIDE),
    "mask of a scalar": lambda a, b: a,
    "max": lambda a, b: a.float().amax(1, keepdim=True).expand(SIDE, SIDE),
}
ROUNDED_SUMS = ("dot", "sum")


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(SIDE, SIDE, generator=generator).bfloat16() for _ in range(2))
    x[0, :4] = torch.tensor([0.0, -0.0, float("inf"), 1e-39])
    return x, y


@pytest.mark.parametrize("operation", EXPECTED)
def test_agrees_with_torch(operation: str) -> None:
    x, y = operands()
    if operation in ROUNDED_SUMS:
        x[0, :4] = 1.0
    expected = EXPECTED[operation](x, y)
    out = torch.full((SIDE, SIDE), float("nan"), dtype=expected.dtype)
    compute[(1,)](x, y, out, SIDE, operation)
    tolerance = 1e-5 if operation in ROUNDED_SUMS else 0.0
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_every_rounding() -> None:
    """float32 numbers halfway between two bfloat16 ones, beside those, and what is not finite."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] * 2**16
    around = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (bits + around).view(torch.float32).flatten()
    expected = values.bfloat16()
    out = torch.from_numpy(interpreter_repair.narrow(values.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


def test_sum_in_bfloat16_is_refused() -> None:
    x, y = operands()
    with pytest.raises(InterpreterError, match="not repaired for reductions"):
        compute[(1,)](x, y, torch.empty(SIDE, SIDE), SIDE, "sum in bfloat16")
