"""A frozen linear layer with sparse deltas on its weight, and any number of LoRA adapters beside them.

    y  = x Wᵀ + Σₖ sₖ x Sₖᵀ + Σᵢ hᵢ Bᵢᵀ + b
    dx = dy W + Σₖ sₖ dy Sₖ + Σᵢ Dᵢ(gᵢ Aᵢ)
    dvₖ[e] = sₖ Σ_t dy[t, row(e)] x[t, column(e)]         vₖ: the entries of Sₖ, e one of them
    dAᵢ, dBᵢ, hᵢ, gᵢ, Dᵢ, db as in `lora_linear`

Shapes: x [..., in], W and Sₖ [out, in], vₖ [entries], y [..., out]. Every step costs what the entries of S cost: S is
never made dense, W is never copied, and of dW only the entries of S are formed (a sampled product of two dense
matrices). What is kept for the backward pass is x, once for values and adapters alike, and h and the seed of
`lora_linear`; W, the index sets and the values are held, not copied. Sums are formed in float32 (float64 where x or y
is float64) and added to the base product, which is then rounded once more.

Source: RoSA, Nikdan et al. 2024 (arXiv:2401.04679), section 3.2; SpIEL, Ansell et al. 2024 (arXiv:2401.16405),
section 3; LT-SFT, Ansell et al. 2022 (arXiv:2110.07560). Their published code forms the dense dW and gathers from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import SparseIndices
from peftkern.ops import dropout
from peftkern.ops.lora_linear import (
    FLOAT_DTYPES,
    Adapters,
    Weight,
    as_matrix,
    bias_gradient,
    check_adapters,
    check_call,
    check_versions,
    flatten_weight,
    in_autocast_dtype,
    inner_products,
    is_plain_eager,
    weight_tensors,
    weight_versions,
)


@dataclass(frozen=True)
class Deltas:
    """The active deltas of one call: equally long lists."""

    values: list[Tensor]
    indices: list[SparseIndices]
    scaling: list[float]

    def tensors(self) -> list[Tensor]:
        """Every tensor of them."""
        return [*self.values, *(tensor for indices in self.indices for tensor in indices.tensors())]

    def __iter__(self) -> Iterator[tuple[Tensor, SparseIndices, float]]:
        return zip(self.values, self.indices, self.scaling, strict=True)


def sparse_delta_linear(
    x: Tensor,
    weight: Weight,
    values: Tensor | Sequence[Tensor],
    indices: SparseIndices | Sequence[SparseIndices],
    scaling: float | Sequence[float] = 1.0,
    lora_A: Tensor | Sequence[Tensor] | None = None,
    lora_B: Tensor | Sequence[Tensor] | None = None,
    lora_scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """``y = x Wᵀ + Σ scalingₖ · x Sₖᵀ + Σ lora_scalingᵢ · dropout(x) Aᵢᵀ Bᵢᵀ + bias`` with a frozen W and sparse Sₖ.

    Differentiable, once, in ``x``, ``values``, ``lora_A``, ``lora_B`` and ``bias``; only what asks for a gradient gets
    one. Without an entry, the result has the bits of `lora_linear`.

    Args:
        x: [..., in], float64, float32, bfloat16 or float16; any strides, any number of tokens, 0 included.
        weight: [out, in], a floating-point tensor that asks for no gradient, or a ``QuantizedTensor``.
        values: [entries] in the row order of ``indices``, of any floating-point dtype, or one per delta. The gradient
            has this dtype.
        indices: which entries of the matrix they are, for a matrix of the weight's shape, or one per delta.
        scaling: factor on a delta, or one per delta.
        lora_A, lora_B, lora_scaling, bias, dropout_p: as for `lora_linear`, ``lora_scaling`` being its ``scaling``.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        [..., out] in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: index sets are inconsistent or of another shape than the weight, ``values`` do not fit them in
            number, lists differ in length, devices differ; and where `lora_linear` raises it.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: in the backward pass, if the weight, the values or an index set was modified in place after the
            forward pass.
        BackendError: a forced backend cannot run the call.

    Backends run ``sparse_delta(y [tokens, out], x [tokens, in], values, indices, scaling) -> None``, which adds to y,
    and ``sparse_delta_backward(grad [tokens, out], x or None, grad_x [tokens, in] or None, values, indices, scaling,
    need_values) -> grad_values or None``, which adds to grad_x where it is given and needs x where ``need_values``. The
    dtypes of y (that of grad), x (that of grad_x) and values are independent; y and grad_x are contiguous.
    """
    adapters = check_adapters(lora_A, lora_B, lora_scaling, dropout_p)
    check_call(x, weight, adapters, bias)
    deltas = checked_deltas("sparse_delta_linear", values, indices, scaling, weight.shape, x.device)
    x = in_autocast_dtype(x)
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    lora = (*adapters.lora_A, *adapters.lora_B)
    if is_plain_eager((x, *weight_tensors(weight), *deltas.tensors(), *lora), bias):
        options = (adapters.scaling, adapters.dropout_p, seed)
        call = (weight, deltas.indices, deltas.scaling, *options, backend)
        return _apply_linear(x, bias, call, *deltas.values, *lora)
    lists = (adapters.lora_A, adapters.lora_B, adapters.scaling, adapters.dropout_p)
    y: Tensor
    y, _ = torch.ops.peftkern.lora_linear(x, *flatten_weight(weight), *lists, seed, bias, backend)
    return add_by_operator(y, x, deltas, backend)


def add_sparse_delta(
    y: Tensor,
    x: Tensor,
    values: Tensor | Sequence[Tensor],
    indices: SparseIndices | Sequence[SparseIndices],
    scaling: float | Sequence[float] = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """``y + Σ scalingₖ · x Sₖᵀ``, for a layer whose base product y is not ours.

    Differentiable, once, in ``y``, ``x`` and ``values``; only what asks for a gradient gets one.

    Args:
        y: [..., out], float64, float32, bfloat16 or float16; any strides. It is not written.
        x: [..., in], the same leading dimensions; its dtype may be another one.
        values, indices, scaling, backend: as for `sparse_delta_linear`, the index sets being of shape [out, in].

    Returns:
        A new tensor, [..., out] in the dtype of y; autocast changes nothing.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `sparse_delta_linear`; ``ValueError`` too where x and y
            differ in their leading dimensions.
    """
    for name, tensor in (("y", y), ("x", x)):
        _check_tensor("add_sparse_delta", name, tensor)
    if y.dim() == 0 or x.dim() == 0 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"add_sparse_delta: y must be [..., out] and x [..., in] with the same leading dimensions; "
            f"got {list(y.shape)} and {list(x.shape)}"
        )
    if y.device != x.device:
        raise ValueError(f"add_sparse_delta: y is on {y.device} and x on {x.device}; move one of them")
    shape = torch.Size((y.shape[-1], x.shape[-1]))
    deltas = checked_deltas("add_sparse_delta", values, indices, scaling, shape, x.device)
    if is_plain_eager((y, x, *deltas.tensors())):
        return _apply_add(y, x, (deltas.indices, deltas.scaling, backend), *deltas.values)
    return add_by_operator(y.clone() if not deltas.values else y, x, deltas, backend)


# ---- checks


def _check_tensor(operation: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operation}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{operation}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise ValueError(f"{operation}: {name} must be dense, got {value.layout}; use {name}.to_dense()")


def checked_deltas(
    operation: str, values: Any, indices: Any, scaling: Any, shape: torch.Size, device: torch.device
) -> Deltas:
    if isinstance(values, Tensor):
        values, indices = [values], [indices]
    elif not isinstance(values, Sequence | torch.nn.ParameterList):
        raise TypeError(f"{operation}: values must be a tensor or a sequence of them, got {type(values).__name__}")
    elif not isinstance(indices, Sequence):
        raise TypeError(f"{operation}: indices must be a sequence, as values is one; got {type(indices).__name__}")
    scaling = [float(s) for s in scaling] if isinstance(scaling, Sequence) else [float(scaling)] * len(values)
    for name, entries in (("indices", indices), ("scaling", scaling)):
        if len(entries) != len(values):
            raise ValueError(f"{operation}: {name} must have one entry per delta, {len(values)}; got {len(entries)}")
    for value, index in zip(values, indices, strict=True):
        _check_delta(operation, value, index, shape, device)
    return Deltas(list(values), list(indices), scaling)


def _check_delta(operation: str, values: Any, indices: Any, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(indices, SparseIndices):
        raise TypeError(
            f"{operation}: indices must be a SparseIndices, got {type(indices).__name__}; "
            "use SparseIndices.from_flat or SparseIndices.from_mask"
        )
    _check_tensor(operation, "values", values)
    if tuple(indices.shape) != tuple(shape):
        raise ValueError(
            f"{operation}: indices must be of a matrix [out, in] = {list(shape)}, got {list(indices.shape)}"
        )
    indices.validate()
    if tuple(values.shape) != (len(indices),):
        raise ValueError(f"{operation}: values must be [entries] = [{len(indices)}], got {list(values.shape)}")
    for name, place in (("values", values.device), ("indices", indices.device)):
        if place != device:
            raise ValueError(f"{operation}: {name} is on {place} and x on {device}; move one of them")


# ---- reference

_REFERENCE_ELEMENTS = 1 << 22
"""How many products the reference holds at a time, in place of all [entries, tokens]."""


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _add_products(
    y: Tensor, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor, scaling: float, dtype: torch.dtype
) -> None:
    """``y[:, rows] += scaling · x[:, columns] values``, summed where a row repeats; y is [tokens, any]."""
    x_turned = x.t().to(dtype)
    total = x_turned.new_zeros(y.shape[1], y.shape[0])
    for part in _parts(len(values), y.shape[0]):
        total.index_add_(0, rows[part], x_turned[columns[part]] * values[part, None].to(dtype))
    y.copy_((y.to(dtype) + scaling * total.t()).to(y.dtype))


def _parts(entries: int, tokens: int) -> Iterator[slice]:
    size = max(1, _REFERENCE_ELEMENTS // max(tokens, 1))
    return (slice(begin, begin + size) for begin in range(0, entries, size))


@registry.register("sparse_delta", "reference")
def sparse_delta_reference(y: Tensor, x: Tensor, values: Tensor, indices: SparseIndices, scaling: float) -> None:
    """``y += scaling · x Sᵀ`` in plain PyTorch; y is [tokens, out], x [tokens, in]."""
    if len(indices) == 0:
        return
    rows = indices.row_of_entries()
    _add_products(y, x, values, rows, indices.columns, scaling, _compute_dtype(y, x))


@registry.register("sparse_delta_backward", "reference")
def sparse_delta_backward_reference(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    values: Tensor,
    indices: SparseIndices,
    scaling: float,
    need_values: bool,
) -> Tensor | None:
    """``grad_x += scaling · grad S`` where grad_x is given, and the gradient of the values where it is needed."""
    rows = indices.row_of_entries()
    if grad_x is not None and len(indices) > 0:
        _add_products(grad_x, grad, values, indices.columns, rows, scaling, _compute_dtype(grad, grad_x))
    if not need_values:
        return None
    assert x is not None
    dtype = _compute_dtype(grad, x)
    grad_turned, x_turned = grad.t().to(dtype), x.t().to(dtype)
    grad_values = grad_turned.new_empty(len(indices))
    for part in _parts(len(indices), grad.shape[0]):
        grad_values[part] = (grad_turned[rows[part]] * x_turned[indices.columns[part]]).sum(1)
    return (scaling * grad_values).to(values.dtype)


# ---- eager calls


def index_versions(indices: Sequence[SparseIndices]) -> list[int | None]:
    tensors = [tensor for index in indices for tensor in index.tensors()]
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def check_index_versions(indices: Sequence[SparseIndices], versions: Sequence[int | None]) -> None:
    if index_versions(indices) != versions:
        raise RuntimeError(
            "sparse_delta: an index set was modified in place between the forward and the backward pass, which needs "
            "it as it was; modify it after backward, or call the layer again"
        )


def backward_deltas(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    deltas: Deltas,
    need_values: Sequence[bool],
    backend: str | None,
) -> list[Tensor | None]:
    """The gradients of the values; adds to grad_x where it is given. All matrices, [tokens, features]."""
    if grad_x is None and not any(need_values):
        return [None] * len(need_values)
    return [
        registry.run("sparse_delta_backward", grad, x, grad_x, *delta, need, backend=backend)
        for delta, need in zip(deltas, need_values, strict=True)
    ]


class _SparseDeltaLinear(torch.autograd.Function):
    """The operators' twin for plain eager calls. ``tensors`` are all values, then every A, then every B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, call: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        weight, indices, scaling, lora_scaling, dropout_p, seed, backend = call
        count, adapters_count = len(indices), len(lora_scaling)
        values, lora = list(tensors[:count]), tensors[count:]
        adapters = Adapters(lora[:adapters_count], lora[adapters_count:], lora_scaling, dropout_p, seed)
        x_ = as_matrix(x)
        y, h = registry.run("lora_linear", x_, weight, adapters, bias, backend=backend)
        for delta in Deltas(values, indices, scaling):
            registry.run("sparse_delta", y, x_, *delta, backend=backend)
        # not among the saved tensors, whose hooks would copy or offload what stays where it is anyway
        ctx.call = (*call[:5], backend)
        ctx.versions = (weight_versions(weight), index_versions(indices))
        need_saved_x = any(ctx.needs_input_grad[3 : 3 + count + adapters_count])
        need_h = any(ctx.needs_input_grad[3 + count + adapters_count :])
        ctx.save_for_backward(x if need_saved_x else None, seed, h if need_h else None, *tensors)
        # not a view in autograd's eyes: the output of an operator may be modified in place, a view may not
        return cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, indices, scaling, lora_scaling, dropout_p, backend = ctx.call
        check_versions(weight, ctx.versions[0])
        check_index_versions(indices, ctx.versions[1])
        x, seed, h, *tensors = ctx.saved_tensors
        count, adapters_count = len(indices), len(lora_scaling)
        lora = tensors[count:]
        adapters = Adapters(lora[:adapters_count], lora[adapters_count:], lora_scaling, dropout_p, seed)
        need_x, need_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3 : 3 + count]
        need_lora = ctx.needs_input_grad[3 + count :]
        grad = grad.resolve_neg()  # the operator would be handed it so
        grad_, x_ = as_matrix(grad), None if x is None else as_matrix(x)
        grad_x, grad_A, grad_B = None, [None] * adapters_count, [None] * adapters_count
        if need_x or any(need_lora):
            h = inner_products(h, grad, adapters)
            grad_x, grad_A, grad_B = registry.run(
                "lora_linear_backward", grad_, x_, weight, adapters, h, need_x, need_lora, backend=backend
            )
        deltas = Deltas(tensors[:count], indices, scaling)
        grad_values = backward_deltas(grad_, x_, grad_x, deltas, need_values, backend)
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        grad_bias = bias_gradient(grad) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, *grad_values, *grad_A, *grad_B


_apply_linear = cast(Callable[..., Tensor], _SparseDeltaLinear.apply)


class _AddSparseDelta(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: tuple[Any, ...], *values: Tensor) -> Tensor:
        indices, scaling, backend = call
        ctx.call, ctx.versions, ctx.x_dtype = call, index_versions(indices), x.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *values)
        return _added(y, x, Deltas(list(values), indices, scaling), backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, scaling, backend = ctx.call
        check_index_versions(indices, ctx.versions)
        x, *values = ctx.saved_tensors
        need_y, need_x = ctx.needs_input_grad[:2]
        grad = grad.resolve_neg()
        deltas = Deltas(values, indices, scaling)
        grad_x = _zeros_like_x(grad, indices[0].shape[1], ctx.x_dtype) if need_x and indices else None
        need_values = ctx.needs_input_grad[3:]
        x_, grad_x_ = (None if matrix is None else as_matrix(matrix) for matrix in (x, grad_x))
        grad_values = backward_deltas(as_matrix(grad), x_, grad_x_, deltas, need_values, backend)
        return grad if need_y else None, grad_x, None, *grad_values


_apply_add = cast(Callable[..., Tensor], _AddSparseDelta.apply)


def _added(y: Tensor, x: Tensor, deltas: Deltas, backend: str | None) -> Tensor:
    """y + Σ scaling · x Sᵀ in new, contiguous memory."""
    out = y.clone(memory_format=torch.contiguous_format)
    for delta in deltas:
        registry.run("sparse_delta", as_matrix(out), as_matrix(x), *delta, backend=backend)
    return out


def _zeros_like_x(grad: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    return grad.new_zeros(*grad.shape[:-1], in_features, dtype=dtype)


# ---- operators

_INDICES_SCHEMA = "Tensor row_offsets, Tensor columns, Tensor column_offsets, Tensor rows, Tensor order"
_INDEX_TENSORS = 5


def add_by_operator(y: Tensor, x: Tensor, deltas: Deltas, backend: str | None) -> Tensor:
    """y + Σ scaling · x Sᵀ, every sum an operator's."""
    for values, indices, scaling in deltas:
        y = torch.ops.peftkern.sparse_delta(y, x, values, *indices.tensors(), scaling, backend)
    return y


@torch.library.custom_op(
    "peftkern::sparse_delta",
    mutates_args=(),
    schema=f"(Tensor y, Tensor x, Tensor values, {_INDICES_SCHEMA}, float scaling, str? backend) -> Tensor",
)
def _forward_operator(y: Tensor, x: Tensor, values: Tensor, *arguments: Any) -> Tensor:
    *index_tensors, scaling, backend = arguments
    indices = SparseIndices(torch.Size((y.shape[-1], x.shape[-1])), *index_tensors)
    _check_delta("sparse_delta", values, indices, indices.shape, x.device)
    return _added(y, x, Deltas([values], [indices], [scaling]), backend)


@_forward_operator.register_fake
def _forward_fake(y: Tensor, *_arguments: Any) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op(
    "peftkern::sparse_delta_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, Tensor values, {_INDICES_SCHEMA}, SymInt in_features, ScalarType x_dtype, "
    "float scaling, bool need_x, bool need_values, str? backend) -> Tensor[]",
)
def _backward_operator(grad: Tensor, x: Tensor | None, values: Tensor, *arguments: Any) -> list[Tensor]:
    in_features, x_dtype, scaling, need_x, need_values, backend = arguments[_INDEX_TENSORS:]
    indices = SparseIndices(torch.Size((grad.shape[-1], in_features)), *arguments[:_INDEX_TENSORS])
    _check_delta("sparse_delta_backward", values, indices, indices.shape, grad.device)
    grad_x = _zeros_like_x(grad, in_features, x_dtype) if need_x else None
    x_, grad_x_ = (None if matrix is None else as_matrix(matrix) for matrix in (x, grad_x))
    deltas = Deltas([values], [indices], [scaling])
    grad_values = backward_deltas(as_matrix(grad), x_, grad_x_, deltas, [need_values], backend)
    return [gradient for gradient in (grad_x, *grad_values) if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(grad: Tensor, _x: Tensor | None, values: Tensor, *arguments: Any) -> list[Tensor]:
    in_features, x_dtype, _scaling, need_x, need_values, _backend = arguments[_INDEX_TENSORS:]
    grad_x = [grad.new_empty(*grad.shape[:-1], in_features, dtype=x_dtype)] if need_x else []
    return grad_x + ([values.new_empty(values.shape)] if need_values else [])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _y, x, values, *index_tensors, scaling, backend = inputs
    ctx.options = (x.shape[-1], x.dtype, scaling, backend)
    ctx.save_for_backward(x if values.requires_grad else None, values, *index_tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_y, need_x, need_values = ctx.needs_input_grad[:3]
    in_features, x_dtype, scaling, backend = ctx.options
    gradients: list[Tensor] = []
    if need_x or need_values:
        gradients = torch.ops.peftkern.sparse_delta_backward(
            grad, *ctx.saved_tensors, in_features, x_dtype, scaling, need_x, need_values, backend
        )
    remaining = iter(gradients)
    grad_x = next(remaining) if need_x else None
    grad_values = next(remaining) if need_values else None
    return grad if need_y else None, grad_x, grad_values, *[None] * (_INDEX_TENSORS + 2)


_forward_operator.register_autograd(_backward, setup_context=_setup_context)
