"""Repairs the interpreter of Triton 3.9, the second opinion on the kernels: bfloat16, and conditions on scalars.

The interpreter keeps bfloat16 as its bits in uint16 and computes on those as if they were whole numbers; conversions
from float32 cut bits off instead of rounding. Repaired, an operation widens its bfloat16 operands to float32, which is
exact, runs as it is, and rounds its result to nearest, ties to even. That is what a GPU does for one operation.

Repaired in bfloat16 are arithmetic, comparisons, ``where``, mathematical functions, ``dot`` and casts. Sums and other
reductions or scans in bfloat16 raise: kernels have no use for them, as they sum in float32.

A comparison's result keeps its operands' type, which a scalar takes along into the mask that it becomes part of, and
no mask of whole numbers is accepted. Repaired, it is of truth values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

_QUIET_NAN = np.uint16(0x7FC0)


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits, as uint16, of float32 values: to nearest, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), _QUIET_NAN, rounded.astype(np.uint16))


def apply() -> None:
    """Repair the interpreter of this process; before the first launch."""
    for name in ("unary_op", "binary_op", "ternary_op", "create_dot"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _rounding_cast(InterpreterBuilder.cast_impl)
    ReduceScanOpInterface.check_tensor = _refusing_bfloat16(ReduceScanOpInterface.check_tensor)


def _is_bfloat16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype == tl.bfloat16


def _widened(operand: Any) -> Any:
    return TensorHandle(widen(operand.data), tl.float32) if _is_bfloat16(operand) else operand


def _in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def repaired(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        # The last operand that is a tensor has the result's type: the accumulator of a product, the branch of a choice.
        tensors = [operand for operand in operands if isinstance(operand, TensorHandle)]
        result = method(self, *map(_widened, operands))
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        if _is_bfloat16(tensors[-1]) and result.data.dtype == np.float32:
            return TensorHandle(narrow(result.data), tl.bfloat16)
        return result

    return repaired


def _rounding_cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def repaired(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar != tl.bfloat16:
            return method(self, _widened(source), target)
        return TensorHandle(narrow(method(self, _widened(source), tl.float32).data), tl.bfloat16)

    return repaired


def _refusing_bfloat16(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def repaired(self: ReduceScanOpInterface, tensors: Any) -> None:
        method(self, tensors)
        if any(tensor.dtype.scalar == tl.bfloat16 for tensor in tensors):
            raise TypeError("the interpreter is not repaired for reductions in bfloat16; reduce in float32")

    return repaired
