"""Normalisation of rows, alone or behind the residual addition that a block begins with.

    t  = x + residual                                t = x where there is no residual
    r  = 1 / √(mean((t - μ)²) + ε)                   μ = mean(t) for a layer norm, 0 for an RMS norm
    n  = (t - μ) r
    y  = n ⊙ (w + o) + b                             o: an offset that some models keep out of their weight
    dn = dy ⊙ (w + o)
    dx = dresidual = r (dn - mean(dn) - n mean(dn ⊙ n)) + dt        mean(dn): of a layer norm alone
    dw = Σ dy ⊙ n                   db = Σ dy        over all rows

x, residual, t and y are [..., features], w and b [features]; dt is what arrives at t, the next residual stream. What is
kept for the backward pass is t, and r (and μ) of each row in float32. Sums and arithmetic are in float32 (float64 for
float64 inputs); t is rounded once, and so is y, but for `round_before_weight`.

Sources: Layer Normalization, Ba, Kiros and Hinton 2016 (arXiv:1607.06450), eq. 3 and 4; Root Mean Square Layer
Normalization, Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.lora_linear import FLOAT_DTYPES, as_matrix, bias_gradient, compute_dtype, is_plain_eager


@dataclass(frozen=True)
class NormForm:
    """What is computed, but for tensors.

    Attributes:
        eps: ε.
        weight_offset: o.
        centered: whether the mean is subtracted (layer norm).
        round_before_weight: whether n is rounded to the dtype of x before the weight multiplies it.
    """

    eps: float
    weight_offset: float = 0.0
    centered: bool = False
    round_before_weight: bool = False


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: None = None,
    weight_offset: float = 0.0,
    *,
    round_before_weight: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor,
    weight_offset: float = 0.0,
    *,
    round_before_weight: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    *,
    round_before_weight: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square normalisation of the last dimension, of x or of ``x + residual``.

    Differentiable, once, in ``x``, ``residual`` and ``weight``; only what asks for a gradient gets one.

    Args:
        x: [..., features], float64, float32, bfloat16 or float16, any strides; features > 0.
        weight: [features], of any of these dtypes; ``None`` stands for ones.
        eps: added to the mean of the squares.
        residual: of the shape, dtype and device of x, added to it first.
        weight_offset: added to the weight. Gemma's models keep ``weight - 1``.
        round_before_weight: round to the dtype of x before multiplying with the weight as well as behind it, as the
            Llama models of `transformers` do. Those of Gemma and OLMo 2 round once.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        y; with a residual y and the sum, the next residual stream. Contiguous, of the shape and dtype of x; autocast
        changes nothing.

    Raises:
        ValueError: shapes or devices do not fit, there is no feature, or a tensor is sparse.
        TypeError: an argument is no tensor or has another dtype.
        BackendError: a forced backend cannot run the call.
    """
    form = NormForm(float(eps), float(weight_offset), False, bool(round_before_weight))
    return _norm("rms_norm", x, residual, weight, None, form, backend)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: None = None,
    *,
    backend: str | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation of the last dimension, of x or of ``x + residual``.

    Differentiable, once, in ``x``, ``residual``, ``weight`` and ``bias``; only what asks for a gradient gets one.

    Args:
        x: [..., features], float64, float32, bfloat16 or float16, any strides; features > 0.
        weight: [features], of any of these dtypes; ``None`` stands for ones.
        bias: as the weight; ``None`` stands for zeros.
        eps: added to the variance.
        residual: of the shape, dtype and device of x, added to it first.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        y; with a residual y and the sum, the next residual stream. Contiguous, of the shape and dtype of x; autocast
        changes nothing.

    Raises:
        ValueError: shapes or devices do not fit, there is no feature, or a tensor is sparse.
        TypeError: an argument is no tensor or has another dtype.
        BackendError: a forced backend cannot run the call.
    """
    return _norm("layer_norm", x, residual, weight, bias, NormForm(float(eps), centered=True), backend)


def _norm(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    _check(name, x, residual, weight, bias)
    tensors = [tensor for tensor in (x, residual, weight, bias) if tensor is not None]
    if not is_plain_eager(tensors):
        options = (form.eps, form.weight_offset, form.centered, form.round_before_weight)
        y, total, *_ = torch.ops.peftkern.norm(x, residual, weight, bias, *options, backend)
        return y if residual is None else (y, total)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _apply(x, residual, weight, bias, form, backend)
    y, total, *_ = _run_forward(x, residual, weight, bias, form, backend)
    return y if residual is None else (y, cast(Tensor, total))


def _check(name: str, x: Any, residual: Any, weight: Any, bias: Any) -> None:
    given = [("x", x), ("residual", residual), ("weight", weight), ("bias", bias)]
    for what, value in given:
        if value is None and what != "x":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {what} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: {what} must be float64, float32, bfloat16 or float16, got {value.dtype}")
        if value.layout != torch.strided:
            raise ValueError(f"{name}: {what} must be dense, got {value.layout}; use {what}.to_dense()")
        if value.device != x.device:
            raise ValueError(f"{name}: {what} is on {value.device} and x on {x.device}; move one of them")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x must be [..., features] with at least one feature, got {list(x.shape)}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"{name}: residual must have the dtype of x, {x.dtype}; got {residual.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual must have the shape of x, {list(x.shape)}; got {list(residual.shape)}")
    for what, value in given[2:]:
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {what} must be [features], [{x.shape[-1]}] here; got {list(value.shape)}")


# ---- reference


@registry.register("norm", "reference")
def norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Forward in plain PyTorch, in float32 (float64 for float64 inputs).

    Args:
        x, residual: [rows, features]; ``residual`` may be ``None``, as may ``weight`` and ``bias``, [features].

    Returns:
        y; the sum x + residual, or ``None``; the mean of each row, or ``None`` for an RMS norm; r of each row.
    """
    dtype = compute_dtype(x)
    total = None if residual is None else (x + residual).contiguous()
    values = (x if total is None else total).to(dtype)
    mean = values.mean(-1) if form.centered else None
    centered = values if mean is None else values - mean[:, None]
    rstd = torch.rsqrt(centered.square().mean(-1) + form.eps)
    y = centered * rstd[:, None]
    if form.round_before_weight:
        y = y.to(x.dtype).to(dtype)
    if weight is not None:
        y = y * (weight.to(dtype) + form.weight_offset)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).contiguous(), total, mean, rstd


@registry.register("norm_backward", "reference")
def norm_backward_reference(
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
    """Backward in plain PyTorch: the gradients of x (and of the residual), weight and bias, or ``None``.

    Args:
        grad, grad_total: what arrives at y and at the sum, [rows, features]; ``grad_total`` may be ``None``.
        total: what was normalised, x or the sum.
        mean, rstd: of each row, as `norm_reference` returns them.

    Returns:
        The gradient of x in the dtype of ``total``, those of weight and bias, [features], in float32 (float64).
    """
    dtype = compute_dtype(total)
    grad_, values = grad.to(dtype), total.to(dtype)
    normal = (values if mean is None else values - mean[:, None]) * rstd[:, None]
    grad_x = None
    if need_x:
        scaled = grad_ if weight is None else grad_ * (weight.to(dtype) + form.weight_offset)
        along = normal * (scaled * normal).mean(-1, keepdim=True)
        centered = scaled if mean is None else scaled - scaled.mean(-1, keepdim=True)
        grad_x = (centered - along) * rstd[:, None]
        grad_x = (grad_x if grad_total is None else grad_x + grad_total.to(dtype)).to(total.dtype).contiguous()
    grad_weight = (grad_ * normal).sum(0) if need_weight else None
    return grad_x, grad_weight, grad_.sum(0) if need_bias else None


# ---- calls


def _run_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    residual_ = None if residual is None else as_matrix(residual)
    y, total, mean, rstd = registry.run("norm", as_matrix(x), residual_, weight, bias, form, backend=backend)
    # not a view in autograd's eyes: the output of an operator may be modified in place, one of several views may not
    y = torch.ops.aten._unsafe_view(y, x.shape)
    return y, None if total is None else torch.ops.aten._unsafe_view(total, x.shape), mean, rstd


def _run_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    form: NormForm,
    needs: tuple[bool, bool, bool],
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_total_ = None if grad_total is None else as_matrix(grad_total)
    rows = (as_matrix(grad), grad_total_, as_matrix(total))
    grad_x, *others = registry.run("norm_backward", *rows, weight, mean, rstd, form, *needs, backend=backend)
    return None if grad_x is None else grad_x.view(total.shape), *others


class _Norm(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        form: NormForm,
        backend: str | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, total, mean, rstd = _run_forward(x, residual, weight, bias, form, backend)
        ctx.set_materialize_grads(False)
        ctx.call = (form, _dtype_of(weight), _dtype_of(bias), backend)
        wanted = any(ctx.needs_input_grad[:3])  # the gradient of the bias needs nothing
        ctx.save_for_backward(*((x if total is None else total, weight, mean, rstd) if wanted else ()))
        return y if total is None else (y, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        # the operator would be handed them without their negation
        grad = None if grad is None else grad.resolve_neg()
        grad_total = None if grad_total is None else grad_total.resolve_neg()
        return *_gradients(ctx, grad, grad_total, _run_backward), None, None


_apply = cast(Callable[..., "Tensor | tuple[Tensor, Tensor]"], _Norm.apply)


def _dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _gradients(
    ctx: Any,
    grad: Tensor | None,
    grad_total: Tensor | None,
    run: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight and bias."""
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    form, weight_dtype, bias_dtype, backend = ctx.call
    if grad is None:  # of y nothing was used
        return grad_total if need_x else None, grad_total if need_residual else None, None, None
    saved = ctx.saved_tensors
    if not saved:
        return None, None, None, bias_gradient(grad) if need_bias else None
    needs = (need_x or need_residual, need_weight, need_bias)
    grad_x, grad_weight, grad_bias = run(grad, grad_total, *saved, form, needs, backend)
    return (
        grad_x if need_x else None,
        grad_x if need_residual else None,
        None if grad_weight is None else grad_weight.to(weight_dtype),
        None if grad_bias is None else grad_bias.to(bias_dtype),
    )


# ---- operators


@torch.library.custom_op(
    "peftkern::norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool centered, "
    "bool round_before_weight, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward_operator(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    centered: bool,
    round_before_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = NormForm(eps, weight_offset, centered, round_before_weight)
    y, total, mean, rstd = _run_forward(x, residual, weight, bias, form, backend)
    return y, x.new_empty(0) if total is None else total, rstd.new_empty(0) if mean is None else mean, rstd


@_forward_operator.register_fake
def _forward_fake(
    x: Tensor, residual: Tensor | None, _weight: Tensor | None, _bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centered, rows, dtype = options[2], x.shape[:-1].numel(), compute_dtype(x)
    total = x.new_empty(0 if residual is None else x.shape)
    mean = x.new_empty(rows if centered else 0, dtype=dtype)
    return x.new_empty(x.shape), total, mean, x.new_empty(rows, dtype=dtype)


@torch.library.custom_op(
    "peftkern::norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor total, Tensor? weight, Tensor? mean, Tensor rstd, "
    "float weight_offset, bool need_x, bool need_weight, bool need_bias, str? backend) -> Tensor[]",
)
def _backward_operator(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str | None,
) -> list[Tensor]:
    form, needs = NormForm(0.0, weight_offset, mean is not None), (need_x, need_weight, need_bias)
    gradients = _run_backward(grad, grad_total, total, weight, mean, rstd, form, needs, backend)
    return [gradient for gradient in gradients if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(_grad: Tensor, _grad_total: Tensor | None, total: Tensor, *arguments: Any) -> list[Tensor]:
    need_x, need_weight, need_bias, _ = arguments[4:]
    features = [total.new_empty(total.shape[-1], dtype=compute_dtype(total)) for _ in range(need_weight + need_bias)]
    return [total.new_empty(total.shape), *features] if need_x else features


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, eps, weight_offset, centered, round_before_weight, backend = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([total] if residual is None else []), mean, rstd)
    form = NormForm(eps, weight_offset, centered, round_before_weight)
    ctx.call = (form, _dtype_of(weight), _dtype_of(bias), backend)
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, residual, weight))
    kept = (x if residual is None else total, weight, mean if centered else None, rstd)
    ctx.save_for_backward(*(kept if wanted else ()))


def _run_backward_operator(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    form: NormForm,
    needs: tuple[bool, bool, bool],
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    saved = (total, weight, mean, rstd)
    gradients = iter(torch.ops.peftkern.norm_backward(grad, grad_total, *saved, form.weight_offset, *needs, backend))
    grad_x, grad_weight, grad_bias = (next(gradients) if need else None for need in needs)
    return grad_x, grad_weight, grad_bias


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad, grad_total, _run_backward_operator), *[None] * 5


_forward_operator.register_autograd(_backward, setup_context=_setup_context)
