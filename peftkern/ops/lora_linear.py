"""A frozen linear layer, dense or quantized, with any number of LoRA adapters in the same product.

    y  = x Wᵀ + Σᵢ hᵢ Bᵢᵀ + b            hᵢ = sᵢ Dᵢ(x) Aᵢᵀ
    dx = dy W + Σᵢ Dᵢ(gᵢ Aᵢ)              gᵢ = sᵢ dy Bᵢ
    dAᵢ = gᵢᵀ Dᵢ(x)     dBᵢ = dyᵀ hᵢ     db = Σ dy

Shapes: x [..., in], W [out, in], Aᵢ [r, in], Bᵢ [out, r], y [..., out]. Dᵢ is dropout with its own mask, which the
backward pass computes again from the seed (:mod:`peftkern.ops.dropout`). What is kept for the backward pass is x where
an A is trained, the h of all adapters side by side ([tokens, Σr], float32) where a B is, and the seed; nothing of the
size of W. dW is never formed.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1; QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftkern.backends import registry
from peftkern.formats import DoubleQuantization, QuantizedTensor
from peftkern.ops import dropout
from peftkern.ops.dequantize import dequantize_reference

try:  # private; without it every call takes the operator, which is right at any time, only slower
    from torch.utils._python_dispatch import _get_current_dispatch_mode
except ImportError:
    _get_current_dispatch_mode = None  # type: ignore[assignment]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Weight = Tensor | QuantizedTensor

WEIGHT_SCHEMA = (
    "Tensor packed, Tensor? scales, Tensor? scales_absmax, Tensor? scales_offset, "
    "str format, int block_size, int scales_block_size, SymInt out_features, SymInt in_features"
)
WEIGHT_ARGUMENTS = 9
ADAPTER_SCHEMA = "Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] dropout_p, Tensor? seed"
_DENSE = "dense"


@dataclass(frozen=True)
class Adapters:
    """The active adapters of one call: equally long sequences, and the seed of their dropout masks."""

    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Sequence[float]
    dropout_p: Sequence[float]
    seed: Tensor | None

    def __len__(self) -> int:
        return len(self.lora_A)

    def splits(self) -> list[slice]:
        """Which columns of h and g belong to each adapter."""
        ends = [0, *accumulate(lora_A.shape[0] for lora_A in self.lora_A)]
        return [slice(begin, end) for begin, end in pairwise(ends)]


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | Sequence[Tensor] | None = None,
    lora_B: Tensor | Sequence[Tensor] | None = None,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """``y = x Wᵀ + Σ scalingᵢ · dropout(x) Aᵢᵀ Bᵢᵀ + bias`` with a frozen, dense or quantized W.

    Differentiable, once, in ``x``, ``lora_A``, ``lora_B`` and ``bias``; only what asks for a gradient gets one.

    Args:
        x: [..., in], float64, float32, bfloat16 or float16; any strides, any number of tokens, 0 included.
        weight: [out, in], a floating-point tensor that asks for no gradient, or a ``QuantizedTensor``.
        lora_A: [r, in] of any floating-point dtype, r at least 1, or one per active adapter. ``None``: no adapter.
        lora_B: [out, r], or one per active adapter.
        scaling: lora_alpha / r, or one per adapter.
        bias: [out], or ``None``.
        dropout_p: probability to drop an element of x in front of the adapter, or one per adapter. A positive value
            is always applied: pass 0 for evaluation. The mask follows ``torch.manual_seed``.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        [..., out] in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: shapes, devices or lengths do not fit, a tensor is sparse, ``dropout_p`` is outside [0, 1], the
            weight asks for a gradient, or a field of a quantized weight does not fit the others.
        RuntimeError: in the backward pass, if the weight was modified in place after the forward pass.
        TypeError: an argument has the wrong type or dtype.
        BackendError: a forced backend cannot run the call.
    """
    adapters = check_adapters(lora_A, lora_B, scaling, dropout_p)
    check_call(x, weight, adapters, bias)
    x = in_autocast_dtype(x)
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    lists = (adapters.lora_A, adapters.lora_B, adapters.scaling, adapters.dropout_p)
    if is_plain_eager((x, *weight_tensors(weight), *lists[0], *lists[1]), bias):
        return _apply(x, weight, bias, *lists[2:], seed, backend, *lists[0], *lists[1])
    y: Tensor
    y, _ = torch.ops.peftkern.lora_linear(x, *flatten_weight(weight), *lists, seed, bias, backend)
    return y


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on; a float64 x stays."""
    # the meta device has no autocast, and asking for it raises
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


# ---- checks


def _is_list(value: Any) -> bool:
    # lists and tuples first: asking the abstract class takes longer
    return isinstance(value, (list, tuple, Sequence, torch.nn.ParameterList))


def _as_list(value: Any) -> list[Any]:
    return list(value) if _is_list(value) else [value]


def check_adapters(lora_A: Any, lora_B: Any, scaling: Any, dropout_p: Any) -> Adapters:
    """The adapters of one call, without a seed, from arguments as `lora_linear` takes them; raises as it does."""
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"lora_linear: lora_A and lora_B go together, but {missing} is None")
    if lora_A is None:
        return Adapters([], [], [], [], None)
    lists = {"lora_A": _as_list(lora_A), "lora_B": _as_list(lora_B)}
    count = len(lists["lora_A"])
    for name, value in (("scaling", scaling), ("dropout_p", dropout_p)):
        lists[name] = list(value) if _is_list(value) else [value] * count
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"lora_linear: {name} must have one entry per adapter, {count}; got {len(values)}")
    for p in lists["dropout_p"]:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"lora_linear: dropout_p must be between 0 and 1, got {p}")
    scalings = [float(s) for s in lists["scaling"]]
    return Adapters(lists["lora_A"], lists["lora_B"], scalings, [float(p) for p in lists["dropout_p"]], None)


def _check_tensor(name: str, value: Any, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"lora_linear: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"lora_linear: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise ValueError(f"lora_linear: {name} must be dense, got {value.layout}; use {name}.to_dense()")
    if value.device != device:
        raise ValueError(f"lora_linear: {name} is on {value.device} and x on {device}; move one of them")


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...], rule: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"lora_linear: {name} must be {rule} = {list(expected)}, got {list(value.shape)}")


def _check_weight(weight: Any, device: torch.device) -> None:
    if isinstance(weight, QuantizedTensor):
        weight.validate()
        if weight.packed.device != device:
            raise ValueError(f"lora_linear: weight is on {weight.packed.device} and x on {device}; move one of them")
    else:
        _check_tensor("weight", weight, device)
        if weight.requires_grad:
            raise ValueError(
                "lora_linear: weight is frozen by definition, but it requires a gradient; "
                "call weight.requires_grad_(False), or use torch.nn.functional.linear for a trained weight"
            )
    if len(weight.shape) != 2:
        raise ValueError(f"lora_linear: weight must be [out, in], got {list(weight.shape)}")


def check_call(x: Any, weight: Any, adapters: Adapters, bias: Any) -> None:
    """Raise as `lora_linear` does where the arguments do not fit each other."""
    if not isinstance(x, Tensor):
        raise TypeError(f"lora_linear: x must be a tensor, got {type(x).__name__}")
    _check_tensor("x", x, x.device)
    _check_weight(weight, x.device)
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"lora_linear: x must be [..., in] with in = {in_features} as in weight, got {list(x.shape)}")
    _check_factors(adapters, out_features, in_features, x.device)
    if bias is not None:
        _check_tensor("bias", bias, x.device)
        _check_shape("bias", bias, (out_features,), "[out]")


def _check_factors(adapters: Adapters, out_features: int, in_features: int, device: torch.device) -> None:
    for lora_A, lora_B in zip(adapters.lora_A, adapters.lora_B, strict=True):
        _check_tensor("lora_A", lora_A, device)
        _check_tensor("lora_B", lora_B, device)
        if lora_A.dim() != 2 or lora_A.shape[1] != in_features:
            raise ValueError(f"lora_linear: lora_A must be [r, in] with in = {in_features}, got {list(lora_A.shape)}")
        if lora_A.shape[0] == 0:
            raise ValueError("lora_linear: lora_A must be [r, in] with r >= 1, got r = 0; leave an empty adapter out")
        _check_shape("lora_B", lora_B, (out_features, lora_A.shape[0]), "[out, r]")


def check_backward(grad: Tensor, x: Tensor | None, weight: Weight, adapters: Adapters, h: Tensor) -> None:
    """What a raw call of the backward operator can get wrong; autograd's own calls pass."""
    _check_tensor("grad", grad, grad.device)
    _check_weight(weight, grad.device)
    out_features, in_features = weight.shape
    _check_factors(adapters, out_features, in_features, grad.device)
    _check_shape("grad", grad, (*grad.shape[:-1], out_features), "[..., out]")
    _check_tensor("h", h, grad.device)
    _check_shape("h", h, (_tokens(grad), sum(a.shape[0] for a in adapters.lora_A)), "[tokens, Σr]")
    if x is not None:
        _check_tensor("x", x, grad.device)
        _check_shape("x", x, (*grad.shape[:-1], in_features), "[..., in]")


# ---- the weight as operator arguments


def weight_tensors(weight: Weight) -> tuple[Tensor, ...]:
    """Every tensor that makes up the weight."""
    if isinstance(weight, Tensor):
        return (weight,)
    nested = weight.double_quantization
    if nested is None:
        return weight.packed, weight.scales
    return weight.packed, weight.scales, nested.absmax, nested.offset


def flatten_weight(weight: Weight) -> tuple[Any, ...]:
    """The weight as an operator takes it."""
    if isinstance(weight, Tensor):
        return weight, None, None, None, _DENSE, 0, 0, *weight.shape
    nested = weight.double_quantization
    return (
        weight.packed,
        weight.scales,
        None if nested is None else nested.absmax,
        None if nested is None else nested.offset,
        weight.format,
        weight.block_size,
        0 if nested is None else nested.block_size,
        *weight.shape,
    )


def unflatten_weight(dtype: torch.dtype, arguments: Sequence[Any]) -> Weight:
    """The way back from :func:`flatten_weight`; ``dtype`` is that of the activations."""
    packed, scales, scales_absmax, scales_offset, format, block_size, scales_block_size, *shape = arguments
    if format == _DENSE:
        _check_shape("weight", packed, tuple(shape), "[out_features, in_features]")
        return cast(Tensor, packed)
    nested = None
    if scales_absmax is not None:
        nested = DoubleQuantization(scales_absmax, scales_offset, scales_block_size)
    dtype = dtype if dtype != torch.float64 else torch.float32
    return QuantizedTensor(packed, scales, format, torch.Size(shape), dtype, block_size, nested)


# ---- reference


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of reference arithmetic: float64 for a float64 x, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix [out, in] of ``dtype``."""
    if isinstance(weight, QuantizedTensor):
        return dequantize_reference(weight, dtype)
    return weight.to(dtype)


def _dropped(x: Tensor, adapters: Adapters, index: int) -> Tensor:
    """dropout(x) of adapter ``index``; being linear and its own transpose, it serves the gradient as well."""
    p = adapters.dropout_p[index]
    if p == 0.0:
        return x
    assert adapters.seed is not None
    keep = dropout.keep_mask(adapters.seed, index, x.shape[0], x.shape[1], p, x.device)
    return x * keep * dropout.keep_scale(p)  # a product, as nn.Dropout: what is not finite must not vanish


@registry.register("lora_linear", "reference")
def lora_linear_reference(x: Tensor, weight: Weight, adapters: Adapters, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward in plain PyTorch, in float32 (float64 for a float64 x). x is [tokens, in]; returns y and h."""
    dtype = compute_dtype(x)
    x_ = x.to(dtype)
    y = x_ @ dense_weight(weight, dtype).t()
    h = x_.new_zeros(x.shape[0], sum(a.shape[0] for a in adapters.lora_A))
    for index, columns in enumerate(adapters.splits()):
        h[:, columns] = adapters.scaling[index] * (_dropped(x_, adapters, index) @ adapters.lora_A[index].to(dtype).t())
        y += h[:, columns] @ adapters.lora_B[index].to(dtype).t()
    if bias is not None:
        y += bias.to(dtype)
    return y.to(x.dtype), h


@registry.register("lora_linear_backward", "reference")
def lora_linear_backward_reference(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward in plain PyTorch.

    grad is [tokens, out]; x may be ``None`` where no A needs a gradient; ``need_lora`` holds the flags of every A, then
    those of every B.
    """
    dtype = compute_dtype(grad)
    count = len(adapters)
    grad_ = grad.to(dtype)
    grad_A: list[Tensor | None] = [None] * count
    grad_B: list[Tensor | None] = [None] * count
    grad_x = grad_ @ dense_weight(weight, dtype) if need_x else None
    for index, columns in enumerate(adapters.splits()):
        lora_A, lora_B = adapters.lora_A[index], adapters.lora_B[index]
        if need_lora[count + index]:
            grad_B[index] = (grad_.t() @ h[:, columns].to(dtype)).to(lora_B.dtype)
        if not need_x and not need_lora[index]:
            continue
        g = adapters.scaling[index] * (grad_ @ lora_B.to(dtype))
        if need_lora[index]:
            assert x is not None
            grad_A[index] = (g.t() @ _dropped(x.to(dtype), adapters, index)).to(lora_A.dtype)
        if grad_x is not None:
            grad_x += _dropped(g @ lora_A.to(dtype), adapters, index)
    return None if grad_x is None else grad_x.to(grad.dtype), grad_A, grad_B


# ---- eager calls


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})
_COUNTED_TYPES = _PLAIN_TYPES | {FakeTensor}


def is_plain_eager(tensors: Sequence[Tensor], optional: Tensor | None = None) -> bool:
    """Whether nothing watches operators, no compiler and no tracing mode, and every tensor is what its memory says.

    Then an autograd function replaces the operator, whose passage through torch.library takes longer than a small
    layer. Tensor subclasses and lazily negated tensors need that passage.

    Args:
        tensors: every tensor of the call, all on one device.
        optional: one more, or ``None``.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode is None:
        return False
    if tensors[0].is_meta and not _counts_eager_calls:
        return False
    plain = _COUNTED_TYPES if _counts_eager_calls else _PLAIN_TYPES
    if type(optional) not in plain or (optional is not None and optional.is_neg()):
        return False
    for tensor in tensors:
        if type(tensor) not in plain or tensor.is_neg():
            return False
    return _counts_eager_calls or _get_current_dispatch_mode() is None


_counts_eager_calls = False


@contextmanager
def counting_eager_calls() -> Iterator[None]:
    """Inside, calls with meta or fake tensors take the way of plain eager calls even where a mode watches operators.

    For counting what a device is sent by the code that it runs; the mode sees what is below.
    """
    global _counts_eager_calls
    _counts_eager_calls = True
    try:
        yield
    finally:
        _counts_eager_calls = False


def _tokens(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., features] as [tokens, features]; not with -1, which is ambiguous for 0 features."""
    return tensor.reshape(_tokens(tensor), tensor.shape[-1])


def _run_forward(
    x: Tensor, weight: Weight, adapters: Adapters, bias: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    y, h = registry.run("lora_linear", as_matrix(x), weight, adapters, bias, backend=backend)
    # not a view in autograd's eyes: the output of an operator may be modified in place, one of several views may not
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]), h


def _run_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    grad_ = as_matrix(grad)
    x_ = None if x is None else as_matrix(x)
    grad_x, grad_A, grad_B = registry.run(
        "lora_linear_backward", grad_, x_, weight, adapters, h, need_x, need_lora, backend=backend
    )
    if grad_x is not None:
        grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
    return grad_x, grad_A, grad_B


def inner_products(h: Tensor | None, grad: Tensor, adapters: Adapters) -> Tensor:
    """h where it was kept; otherwise memory of its shape, which nothing reads because no B asks for a gradient."""
    if h is not None:
        return h
    ranks = sum(lora_A.shape[0] for lora_A in adapters.lora_A)
    return grad.new_empty(_tokens(grad), ranks, dtype=compute_dtype(grad))


def bias_gradient(grad: Tensor) -> Tensor:
    """The sum over all tokens, [out]."""
    return as_matrix(grad).sum(0)


def weight_versions(weight: Weight) -> list[int | None]:
    """Counts the in-place changes of each tensor of the weight; ``None`` where inference mode keeps no count."""
    return [None if tensor.is_inference() else tensor._version for tensor in weight_tensors(weight)]


def check_versions(weight: Weight, versions: Sequence[int | None]) -> None:
    """Raise in the backward pass where the weight was modified in place after the forward pass."""
    if weight_versions(weight) != versions:
        raise RuntimeError(
            "lora_linear: weight was modified in place between the forward and the backward pass, which needs it "
            "as it was; modify it after backward, or call the layer again"
        )


class _LoraLinear(torch.autograd.Function):
    """The operator's twin for plain eager calls. ``lora`` is every A, then every B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        scaling: list[float],
        dropout_p: list[float],
        seed: Tensor | None,
        backend: str | None,
        *lora: Tensor,
    ) -> Tensor:
        count = len(scaling)
        adapters = Adapters(lora[:count], lora[count:], scaling, dropout_p, seed)
        y, h = _run_forward(x, weight, adapters, bias, backend)
        # not among the saved tensors, whose hooks would copy or offload a weight that stays where it is anyway
        ctx.call = (weight, weight_versions(weight), scaling, dropout_p, backend)
        need_A, need_B = ctx.needs_input_grad[7 : 7 + count], ctx.needs_input_grad[7 + count :]
        ctx.save_for_backward(x if any(need_A) else None, seed, h if any(need_B) else None, *lora)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, versions, scaling, dropout_p, backend = ctx.call
        check_versions(weight, versions)
        x, seed, h, *lora = ctx.saved_tensors
        adapters = Adapters(lora[: len(scaling)], lora[len(scaling) :], scaling, dropout_p, seed)
        need_x, need_lora = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        grad = grad.resolve_neg()  # the operator would be handed it so
        h = inner_products(h, grad, adapters)
        grad_x, grad_A, grad_B = _run_backward(grad, x, weight, adapters, h, need_x, need_lora, backend)
        grad_bias = bias_gradient(grad) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None, None, None, *grad_A, *grad_B


_apply = cast(Callable[..., Tensor], _LoraLinear.apply)


# ---- operators

_ADAPTER_ARGUMENTS = 5


@torch.library.custom_op(
    "peftkern::lora_linear",
    mutates_args=(),
    schema=f"(Tensor x, {WEIGHT_SCHEMA}, {ADAPTER_SCHEMA}, Tensor? bias, str? backend) -> (Tensor, Tensor)",
)
def _forward_operator(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight = unflatten_weight(x.dtype, arguments[:WEIGHT_ARGUMENTS])
    *adapter_arguments, bias, backend = arguments[WEIGHT_ARGUMENTS:]
    adapters = Adapters(*adapter_arguments)
    check_call(x, weight, adapters, bias)
    return _run_forward(x, weight, adapters, bias, backend)


@_forward_operator.register_fake
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out_features, lora_A = arguments[WEIGHT_ARGUMENTS - 2], arguments[WEIGHT_ARGUMENTS]
    ranks = sum(a.shape[0] for a in lora_A)
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(_tokens(x), ranks, dtype=compute_dtype(x))


@torch.library.custom_op(
    "peftkern::lora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, {WEIGHT_SCHEMA}, {ADAPTER_SCHEMA}, Tensor h, bool need_x, bool[] need_lora, "
    "str? backend) -> Tensor[]",
)
def _backward_operator(grad: Tensor, x: Tensor | None, *arguments: Any) -> list[Tensor]:
    weight = unflatten_weight(grad.dtype, arguments[:WEIGHT_ARGUMENTS])
    *adapter_arguments, h, need_x, need_lora, backend = arguments[WEIGHT_ARGUMENTS:]
    adapters = Adapters(*adapter_arguments)
    check_backward(grad, x, weight, adapters, h)
    grad_x, grad_A, grad_B = _run_backward(grad, x, weight, adapters, h, need_x, need_lora, backend)
    return [gradient for gradient in (grad_x, *grad_A, *grad_B) if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(grad: Tensor, x: Tensor | None, *arguments: Any) -> list[Tensor]:
    in_features = arguments[WEIGHT_ARGUMENTS - 1]
    lora_A, lora_B, *_, need_x, need_lora, _backend = arguments[WEIGHT_ARGUMENTS:]
    wanted = [p.new_empty(p.shape) for p, need in zip([*lora_A, *lora_B], need_lora, strict=True) if need]
    return [grad.new_empty(*grad.shape[:-1], in_features), *wanted] if need_x else wanted


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs[0], inputs[1 : 1 + WEIGHT_ARGUMENTS]
    lora_A, lora_B, scaling, dropout_p, seed, _bias, backend = inputs[1 + WEIGHT_ARGUMENTS :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])  # h is there for the backward pass, which has no second derivative
    ctx.count = len(lora_A)
    ctx.options = (weight[4:], scaling, dropout_p, backend)
    need_A, need_B = (any(factor.requires_grad for factor in factors) for factors in (lora_A, lora_B))
    h = output[1] if need_B else None
    ctx.save_for_backward(x if need_A else None, *weight[:4], *lora_A, *lora_B, seed, h)


def _backward(ctx: Any, grad: Tensor | None, _grad_h: Tensor | None) -> tuple[Any, ...]:
    no_weight: list[None] = [None] * WEIGHT_ARGUMENTS
    need_x, need_A, need_B, need_bias = (ctx.needs_input_grad[i] for i in (0, 10, 11, 15))
    nothing: list[Tensor | None] = [None] * ctx.count
    # torch.library takes an empty list of numbers for a list of no tensors, and wants one back
    numbers: list[None] | None = None if ctx.count else []
    if grad is None:
        return None, *no_weight, nothing, nothing, numbers, numbers, None, None, None
    x, *tensors, seed, h = ctx.saved_tensors
    weight_tensors, lora_A, lora_B = tensors[:4], tensors[4 : 4 + ctx.count], tensors[4 + ctx.count :]
    weight_options, scaling, dropout_p, backend = ctx.options
    need_lora = [*need_A, *need_B]
    weight = (*weight_tensors, *weight_options)
    adapters = (lora_A, lora_B, scaling, dropout_p, seed)
    h = inner_products(h, grad, Adapters(*adapters))
    gradients: list[Tensor] = []
    if need_x or any(need_lora):
        gradients = torch.ops.peftkern.lora_linear_backward(grad, x, *weight, *adapters, h, need_x, need_lora, backend)
    remaining = iter(gradients)
    grad_x = next(remaining) if need_x else None
    grad_lora = [next(remaining) if need else None for need in need_lora]
    grad_bias = bias_gradient(grad) if need_bias else None
    grad_A, grad_B = grad_lora[: ctx.count], grad_lora[ctx.count :]
    return grad_x, *no_weight, grad_A, grad_B, numbers, numbers, None, grad_bias, None


_forward_operator.register_autograd(_backward, setup_context=_setup_context)
