"""Enters the Triton kernels in the table of backends; imports PyTorch alone until a tensor on a GPU arrives."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.backends.triton import crossover
from peftkern.backends.triton.launch import is_ours
from peftkern.backends.triton.roofline import Direction
from peftkern.backends.triton.sparse_layout import is_copied
from peftkern.formats import BitMask, QuantizedTensor, SparseIndices
from peftkern.ops.adamw import Coefficients, Scale
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.norm import NormForm
from peftkern.ops.select_top import Scored
from peftkern.ops.silu_mul import NOTHING_FREE

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


@cache
def unavailable_reason() -> str | None:
    """Why Triton cannot be used, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with: pip install triton"
    return None


def _objection(tensor: Tensor) -> str | None:
    if not is_ours(tensor):
        return registry.ELSEWHERE
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < _LEAST_CAPABILITY:
        return "the GPU is older than sm_80"
    return unavailable_reason()


def _objection_to_product(activations: Tensor, weights: Sequence[Weight]) -> str | None:
    objection = _objection(activations)
    if objection is not None:
        return objection
    if activations.dtype not in _DTYPES:
        return f"{activations.dtype} activations"
    for weight in weights:
        if isinstance(weight, Tensor) and weight.dtype not in _DTYPES:
            return f"a {weight.dtype} weight"
        if 0 in weight.shape:
            return "an empty weight"
    return None


# ---- quantize, dequantize


def _supports_quantize(w: Tensor, *_rest: Any) -> str | None:
    return _objection(w)


@registry.register("quantize", "triton", supports=_supports_quantize)
def quantize(w: Tensor, format: str = "nf4", block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    """See :func:`peftkern.ops.quantize.quantize`."""
    from peftkern.backends.triton.quantize import quantize

    return quantize(w, format, block_size, double_quant)


def _supports_dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, *_rest: Any) -> str | None:
    return "float64 results" if dtype == torch.float64 and is_ours(q.packed) else _objection(q.packed)


@registry.register("dequantize", "triton", supports=_supports_dequantize)
def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`peftkern.ops.dequantize.dequantize`."""
    from peftkern.backends.triton.dequantize import dequantize

    return dequantize(q, dtype)


# ---- lora_linear


def _path(direction: Direction, activations: Tensor, weights: Sequence[Weight]) -> str:
    shapes = [weight.shape for weight in weights]
    first = weights[0]
    quantized = isinstance(first, QuantizedTensor) or first.dtype != activations.dtype
    shape = (sum(shape[0] for shape in shapes), shapes[0][1], len(weights))
    device = crossover.device_key(activations)
    return crossover.choose(direction, activations.shape[0], *shape, quantized, activations.dtype, device).path


def _form_forward(x: Tensor, weight: Weight, *_rest: Any) -> str:
    return _path("forward", x, [weight])


def _form_backward(grad: Tensor, _x: Tensor | None, weight: Weight, *_rest: Any) -> str:
    return _path("backward", grad, [weight])


def _form_group(x: Tensor, members: Sequence[Any], *_rest: Any) -> str:
    return _path("forward", x, [member.weight for member in members])


def _form_group_backward(grads: Sequence[Tensor | None], _x: Tensor | None, members: Sequence[Any], *_rest: Any) -> str:
    present = next(grad for grad in grads if grad is not None)
    return _path("backward", present, [member.weight for member in members])


def _supports_forward(x: Tensor, weight: Weight, *_rest: Any) -> str | None:
    return _objection_to_product(x, [weight])


@registry.register("lora_linear", "triton", supports=_supports_forward, form=_form_forward)
def lora_linear(x: Tensor, weight: Weight, adapters: Adapters, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.lora_linear.lora_linear_reference` for shapes."""
    from peftkern.backends.triton.lora_linear import lora_linear

    return lora_linear(x, weight, adapters, bias)


def _supports_backward(grad: Tensor, _x: Tensor | None, weight: Weight, *_rest: Any) -> str | None:
    return _objection_to_product(grad, [weight])


@registry.register("lora_linear_backward", "triton", supports=_supports_backward, form=_form_backward)
def lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.lora_linear.lora_linear_backward_reference` for shapes."""
    from peftkern.backends.triton.lora_linear import lora_linear_backward

    return lora_linear_backward(grad, x, weight, adapters, h, need_x, need_lora)


def _supports_group(x: Tensor, members: Sequence[Any], *_rest: Any) -> str | None:
    return _objection_to_product(x, [member.weight for member in members])


@registry.register("lora_linear_group", "triton", supports=_supports_group, form=_form_group)
def lora_linear_group(x: Tensor, members: Sequence[Any]) -> tuple[list[Tensor], Tensor]:
    """Forward; see :mod:`peftkern.ops.lora_linear_group` for shapes."""
    from peftkern.backends.triton.lora_linear import group_forward

    return group_forward(x, members)


def _supports_group_backward(
    grads: Sequence[Tensor | None], _x: Tensor | None, members: Sequence[Any], *_rest: Any
) -> str | None:
    present = next(grad for grad in grads if grad is not None)
    return _objection_to_product(present, [member.weight for member in members])


@registry.register("lora_linear_group_backward", "triton", supports=_supports_group_backward, form=_form_group_backward)
def lora_linear_group_backward(
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    members: Sequence[Any],
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]], list[list[Tensor | None]]]:
    """Backward; see :mod:`peftkern.ops.lora_linear_group` for shapes."""
    from peftkern.backends.triton.lora_linear import group_backward

    return group_backward(grads, x, members, h, need_x, need_lora)


# ---- norm, rotary


_MOST_FEATURES = 16384
"""As in `triton/norm.py`, which is imported when it runs."""


def _objection_to_values(tensors: Sequence[Tensor]) -> str | None:
    objection = _objection(tensors[0])
    if objection is not None:
        return objection
    return next((f"{tensor.dtype} tensors" for tensor in tensors if tensor.dtype not in _DTYPES), None)


def _supports_norm(x: Tensor, _residual: Tensor | None, weight: Tensor | None, *_rest: Any) -> str | None:
    objection = _objection_to_values([x] if weight is None else [x, weight])
    return f"rows of {x.shape[1]} numbers" if objection is None and x.shape[1] > _MOST_FEATURES else objection


@registry.register("norm", "triton", supports=_supports_norm)
def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Forward; see :func:`peftkern.ops.norm.norm_reference`."""
    from peftkern.backends.triton.norm import norm

    return norm(x, residual, weight, bias, form)


def _supports_norm_backward(
    _grad: Tensor, _grad_total: Tensor | None, total: Tensor, weight: Tensor | None, *_rest: Any
) -> str | None:
    return _supports_norm(total, None, weight)


@registry.register("norm_backward", "triton", supports=_supports_norm_backward)
def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    form: NormForm,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward; see :func:`peftkern.ops.norm.norm_backward_reference`."""
    from peftkern.backends.triton.norm import norm_backward

    return norm_backward(grad, grad_total, total, weight, mean, rstd, form, need_x, need_weight, need_bias)


def _supports_rotary(states: Sequence[Tensor], cos: Tensor, *_rest: Any) -> str | None:
    return _objection_to_values([*states, cos])


@registry.register("rotary", "triton", supports=_supports_rotary)
def rotary(states: Sequence[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> list[Tensor]:
    """See :func:`peftkern.ops.rotary.rotary_reference`."""
    from peftkern.backends.triton.rotary import rotary

    return rotary(states, cos, sin, interleaved, inverse)


# ---- silu_mul


def _supports_silu_mul(tensor: Tensor, *_rest: Any) -> str | None:
    objection = _objection(tensor)
    return f"{tensor.dtype} tensors" if objection is None and tensor.dtype not in _DTYPES else objection


@registry.register("silu_mul", "triton", supports=_supports_silu_mul)
def silu_mul(gate: Tensor, up: Tensor, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """See :func:`peftkern.ops.silu_mul.silu_mul_reference`."""
    from peftkern.backends.triton.silu_mul import silu_mul

    return silu_mul(gate, up, activation, out)


@registry.register("silu_mul_backward", "triton", supports=_supports_silu_mul)
def silu_mul_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    need_gate: bool,
    need_up: bool,
    activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None]:
    """See :func:`peftkern.ops.silu_mul.silu_mul_backward_reference`."""
    from peftkern.backends.triton.silu_mul import silu_mul_backward

    return silu_mul_backward(grad, gate, up, need_gate, need_up, activation, free)


# ---- gated_lora_linear


def _supports_gated_backward(grad: Tensor, _gate: Tensor, _up: Tensor, weight: Weight, *_rest: Any) -> str | None:
    return _objection_to_product(grad, [weight])


@registry.register("gated_lora_linear_backward", "triton", supports=_supports_gated_backward)
def gated_lora_linear_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_gate: bool,
    need_up: bool,
    need_lora: Sequence[bool],
    activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """See :func:`peftkern.ops.gated_lora_linear.gated_lora_linear_backward_reference`."""
    from peftkern.backends.triton.lora_linear import gated_lora_linear_backward

    call = (grad, gate, up, weight, adapters, h, need_gate, need_up, need_lora)
    return gated_lora_linear_backward(*call, activation, free)


# ---- masked_linear


def _masked_path(direction: Direction, activations: Tensor, mask: BitMask) -> str:
    """That of a dense weight."""
    out_features, in_features = mask.shape
    shape = (activations.shape[0], out_features, in_features, 1)
    return crossover.choose(direction, *shape, False, activations.dtype, crossover.device_key(activations)).path


def _form_masked(x: Tensor, _weight: Weight, mask: BitMask, *_rest: Any) -> str:
    return _masked_path("forward", x, mask)


def _form_masked_backward(grad: Tensor, _x: Tensor | None, _weight: Weight, mask: BitMask, *_rest: Any) -> str:
    return _masked_path("backward", grad, mask)


@registry.register("masked_linear", "triton", supports=_supports_forward, form=_form_masked)
def masked_linear(
    x: Tensor, weight: Weight, mask: BitMask, adapters: Adapters, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.masked_linear.masked_linear_reference` for shapes."""
    from peftkern.backends.triton.masked_linear import masked_linear

    return masked_linear(x, weight, mask, adapters, bias)


@registry.register("masked_linear_backward", "triton", supports=_supports_backward, form=_form_masked_backward)
def masked_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    mask: BitMask,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_weight: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.masked_linear.masked_linear_backward_reference` for shapes."""
    from peftkern.backends.triton.masked_linear import masked_linear_backward

    return masked_linear_backward(grad, x, weight, mask, adapters, h, need_x, need_weight, need_lora)


# ---- sparse_delta


def _objection_to_sparse(source: Tensor, *others: Tensor | None) -> str | None:
    objection = _objection(source)
    if objection is not None:
        return objection
    wrong = [tensor.dtype for tensor in (source, *others) if tensor is not None and tensor.dtype not in _DTYPES]
    return f"{wrong[0]} tensors" if wrong else None


def _sparse_form(source: Tensor, indices: SparseIndices) -> str:
    tokens, features = source.shape
    return "copied" if is_copied(len(indices), tokens, features, source.dtype) else "direct"


def _form_sparse(_y: Tensor, x: Tensor, _values: Tensor, indices: SparseIndices, *_rest: Any) -> str:
    return _sparse_form(x, indices)


def _form_sparse_backward(
    grad: Tensor, _x: Tensor | None, _grad_x: Tensor | None, _values: Tensor, indices: SparseIndices, *_rest: Any
) -> str:
    return _sparse_form(grad, indices)


def _supports_sparse(y: Tensor, x: Tensor, values: Tensor, *_rest: Any) -> str | None:
    return _objection_to_sparse(x, y, values)


@registry.register("sparse_delta", "triton", supports=_supports_sparse, form=_form_sparse)
def sparse_delta(y: Tensor, x: Tensor, values: Tensor, indices: SparseIndices, scaling: float) -> None:
    """See :func:`peftkern.ops.sparse_delta_linear.sparse_delta_reference`."""
    from peftkern.backends.triton.sparse_delta import sparse_delta

    sparse_delta(y, x, values, indices, scaling)


def _supports_sparse_backward(
    grad: Tensor, x: Tensor | None, grad_x: Tensor | None, values: Tensor, *_rest: Any
) -> str | None:
    return _objection_to_sparse(grad, x, grad_x, values)


@registry.register("sparse_delta_backward", "triton", supports=_supports_sparse_backward, form=_form_sparse_backward)
def sparse_delta_backward(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    values: Tensor,
    indices: SparseIndices,
    scaling: float,
    need_values: bool,
) -> Tensor | None:
    """See :func:`peftkern.ops.sparse_delta_linear.sparse_delta_backward_reference`."""
    from peftkern.backends.triton.sparse_delta import sparse_delta_backward

    return sparse_delta_backward(grad, x, grad_x, values, indices, scaling, need_values)


# ---- adamw


def _supports_first(first: Tensor, *_rest: Any) -> str | None:
    """Of operations whose tensors are on one device, with dtypes that all are supported."""
    return _objection(first)


@registry.register("adamw", "triton", supports=_supports_first)
def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_reference`."""
    from peftkern.backends.triton.adamw import adamw

    adamw(parameter, gradient, exp_avg, exp_avg_sq, coefficients, age, scale)


@registry.register("adamw_8bit", "triton", supports=_supports_first)
def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_8bit_reference`."""
    from peftkern.backends.triton.adamw import adamw_8bit

    adamw_8bit(parameter, gradient, state1, state2, absmax1, absmax2, coefficients, age, scale)


@registry.register("adamw_probe", "triton", supports=_supports_first)
def adamw_probe(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_probe_reference`."""
    from peftkern.backends.triton.adamw import adamw

    adamw(parameter, gradient, exp_avg, exp_avg_sq, coefficients, age, scale, probe=True)


@registry.register("adamw_8bit_probe", "triton", supports=_supports_first)
def adamw_8bit_probe(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_8bit_probe_reference`."""
    from peftkern.backends.triton.adamw import adamw_8bit

    adamw_8bit(parameter, gradient, state1, state2, absmax1, absmax2, coefficients, age, scale, probe=True)


# ---- select_top


def _supports_scored(entry: Scored, *_rest: Any) -> str | None:
    return _objection(entry.a)


@registry.register("score_histogram", "triton", supports=_supports_scored)
def score_histogram(entry: Scored, shift: int, bits: int, prefix: int) -> Tensor:
    """See :func:`peftkern.ops.select_top.score_histogram_reference`."""
    from peftkern.backends.triton.select_top import score_histogram

    return score_histogram(entry, shift, bits, prefix)


@registry.register("score_collect", "triton", supports=_supports_scored)
def score_collect(entry: Scored, key: int, ties: int, count: int) -> Tensor:
    """See :func:`peftkern.ops.select_top.score_collect_reference`."""
    from peftkern.backends.triton.select_top import score_collect

    return score_collect(entry, key, ties, count)


# ---- importance


@registry.register("accumulate_importance", "triton", supports=_supports_first)
def accumulate_importance(total: Tensor, gradient: Tensor, kind: str, other: Tensor | None) -> None:
    """See :func:`peftkern.ops.importance.accumulate_importance_reference`."""
    from peftkern.backends.triton.importance import accumulate_importance

    accumulate_importance(total, gradient, kind, other)


@registry.register("importance_dot", "triton", supports=_supports_first)
def importance_dot(gradient: Tensor, delta: Tensor) -> Tensor:
    """See :func:`peftkern.ops.importance.importance_dot_reference`."""
    from peftkern.backends.triton.importance import importance_dot

    return importance_dot(gradient, delta)


@registry.register("probe_dot", "triton", supports=_supports_first)
def probe_dot(gradient: Tensor, weight: Tensor, saved: Tensor) -> Tensor:
    """See :func:`peftkern.ops.importance.probe_dot_reference`."""
    from peftkern.backends.triton.importance import probe_dot

    return probe_dot(gradient, weight, saved)
