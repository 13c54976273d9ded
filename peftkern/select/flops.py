"""What an operator costs, and which part of that belongs to which of its outputs.

A multiply-add counts 2, as in :mod:`torch.utils.flop_counter`, whose formulas stand for matrix products, convolutions
and fused attention. The rest is counted by elements:

* 1 per element of the result: every pointwise operator (a product, an exponential, an activation, its derivative);
* 1 per element that goes in: reductions, sums into rows (`index_add`, gradients of embeddings), running sums;
* more for operators that are several of these in one: `_PER_ELEMENT`;
* 1 per weight that is decoded from a quantized one, each time that it is;
* 0: copies, casts, views, fills, random numbers, comparisons, indices.

Operators that compute several gradients in one call say what each costs by itself, so that what a call with fewer of
them costs is known without making it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from peftkern.ops.linear_cross_entropy import labelled_tokens, operator_flops

logger = logging.getLogger("peftkern")

register_flop_formula(torch.ops.peftkern.linear_cross_entropy, get_raw=True)(operator_flops)


@dataclass(frozen=True)
class Part:
    """A part of an operator's work.

    Attributes:
        flops: of this part.
        outputs: positions, among the operator's tensors that come out, of those that need it; ``None``: all.
        of_gradients: those are gradients, which the forward pass makes already.
    """

    flops: float
    outputs: tuple[int, ...] | None = None
    of_gradients: bool = False


Parts = list[Part]
Formula = Callable[[Mapping[str, Any], Any], Parts]
"""From the operator's arguments by name, and what came out."""


def parts_of(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Parts:
    """The parts of one call's work; empty where it does none."""
    formula = _FORMULAS.get(operator.name().split(".")[0])
    if formula is not None:
        return [part for part in formula(_by_name(operator, args, kwargs), out) if part.flops]
    known = flop_registry.get(operator.overloadpacket)
    flops = known(*args, **kwargs, out_val=out) if known is not None else _by_elements(operator, args, kwargs, out)
    return [Part(flops)] if flops else []


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator that runs inside of the with block, those of a backward pass among them.

    ``with FlopCounter() as counter: model(**batch).loss.backward()``, then ``counter.total``. Calls of peftkern's
    layers take their operators' way inside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(part.flops for part in parts_of(func, args, kwargs or {}, out))
        return out


def _by_name(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    arguments = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    return {**defaults, **given, **kwargs}


# ---- by elements

_PER_ELEMENT: Mapping[str, float] = {
    "_softmax": 5,  # the maximum, its difference, the exponential, the sum, the quotient
    "_log_softmax": 5,
    "_softmax_backward_data": 4,
    "_log_softmax_backward_data": 4,
    "native_layer_norm": 8,
    "native_group_norm": 8,
    "native_batch_norm": 8,
    "_fused_rms_norm": 5,
    "native_dropout": 2,
    "cumsum": 1,
    "embedding_dense_backward": 1,
    "index_add": 1,
    "index_put": 1,
    "scatter_add": 1,
    "dot": 2,
}
"""Beside the pointwise operators and the reductions; per element of the largest floating-point tensor that goes in."""

_MOVES = frozenset({"clone", "copy", "where", "masked_fill", "fill", "zero", "_to_copy", "lift_fresh_copy"})
"""Pointwise in name: they compute nothing."""

_WARNED: set[str] = set()


def _by_elements(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    space, _, name = operator.name().split(".")[0].partition("::")
    if space not in ("aten", "prim", "prims"):
        _warn_unknown(f"{space}::{name}")
        return 0.0
    name = name.removesuffix("_") if operator._schema.is_mutable else name
    if name in _MOVES:
        return 0.0
    if name == "index_put" and not _argument(operator, args, kwargs, "accumulate"):
        return 0.0
    if name in _PER_ELEMENT:
        return _PER_ELEMENT[name] * _largest((args, kwargs))
    if torch.Tag.pointwise in operator.tags:
        return _largest(out)
    return _largest((args, kwargs)) if torch.Tag.reduction in operator.tags else 0.0


def _argument(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    return _by_name(operator, args, kwargs).get(name)


def _largest(tree: Any) -> float:
    """Elements of the largest floating-point tensor in ``tree``."""
    sizes = (leaf.numel() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return float(max(sizes, default=0))


def _warn_unknown(name: str) -> None:
    if name not in _WARNED:
        _WARNED.add(name)
        logger.warning("flops: the operator %s is not known, and counts 0", name)


# ---- operators with several outputs

_LAYER_NORM = (10.0, 3.0, 1.0)  # per element: of x, of the weight, of the bias
_RMS_NORM = 4.0  # per element: a square, a sum, and two factors


def _norm_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    size = _largest(arguments["grad_out"])
    wanted = arguments["output_mask"]
    return [Part(size * each, (i,)) for i, each in enumerate(_LAYER_NORM[: len(wanted)]) if wanted[i]]


def _convolution_backward(arguments: Mapping[str, Any], out: Any) -> Parts:
    count = flop_registry[torch.ops.aten.convolution_backward]
    *others, wanted = arguments.values()
    parts = []
    for index in (0, 1):
        if wanted[index]:
            only = [position == index for position in range(3)]
            parts.append(Part(count(*others, only, out_val=out), (index,)))
    return [*parts, Part(_largest(arguments["grad_output"]), (2,))] if wanted[2] else parts


def _attention(arguments: Mapping[str, Any], _out: Any) -> Parts:
    count: Callable[..., float] = sdpa_flop_count
    return [Part(count(*(arguments[name].shape for name in ("query", "key", "value"))))]


def _attention_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    # one kernel, which computes all three gradients in any case
    names = ("grad_out", "query", "key", "value")
    count: Callable[..., float] = sdpa_backward_flop_count
    return [Part(count(*(arguments[name].shape for name in names)))]


def _our_attention_backward(arguments: Mapping[str, Any], out: Any) -> Parts:
    return _attention_backward({**arguments, "grad_out": arguments["grad"]}, out)


def _grouped_product(arguments: Mapping[str, Any], _out: Any) -> Parts:
    a, b = arguments["self"], arguments["mat2"]
    if a.dim() == 3 and b.dim() == 2:
        return [Part(2.0 * b.numel() * a.shape[1])]
    return [Part(2.0 * a.numel() * b.shape[-1])]


def _output_elements(_arguments: Mapping[str, Any], out: Any) -> Parts:
    return [Part(_largest(out))]


def _input_elements(arguments: Mapping[str, Any], _out: Any) -> Parts:
    return [Part(_largest(tuple(arguments.values())))]


def _int8_product(arguments: Mapping[str, Any], _out: Any) -> Parts:
    return [Part(2.0 * arguments["A"].numel() * arguments["B"].shape[0])]


def _packed_product(arguments: Mapping[str, Any], _out: Any) -> Parts:
    out_features, in_features = arguments["shapeB"]
    return [Part((2.0 * _rows(arguments["A"]) + 1.0) * out_features * in_features)]


# ---- operators of peftkern


@dataclass
class _Places:
    """Gives the gradients that were asked for their positions, in the order in which operators return them."""

    next: int = 0

    def take(self, wanted: bool) -> tuple[int, ...]:
        self.next += wanted
        return (self.next - 1,) if wanted else ()


def _product(tokens: float, arguments: Mapping[str, Any]) -> float:
    """The product with the base weight, decoded where it is quantized."""
    weight = float(arguments["out_features"] * arguments["in_features"])
    return 2.0 * tokens * weight + (weight if arguments["format"] != "dense" else 0)


def _rows(x: Tensor) -> float:
    return float(torch.Size(x.shape[:-1]).numel())


def _lora_forward(tokens: float, factors: Sequence[Tensor]) -> float:
    return sum(2.0 * tokens * factor.numel() for factor in factors)


def _linear(arguments: Mapping[str, Any], _out: Any) -> Parts:
    tokens = _rows(arguments["x"])
    lora = _lora_forward(tokens, [*arguments["lora_A"], *arguments["lora_B"]])
    bias = 0.0 if arguments["bias"] is None else tokens * arguments["out_features"]
    return [Part(_product(tokens, arguments) + lora + bias)]


def _linear_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    tokens, places = _rows(arguments["grad"]), _Places()
    x = places.take(arguments["need_x"])
    weight = places.take(arguments.get("need_weight", False))
    parts = [Part(_product(tokens, arguments), x)] if x else []
    if weight:
        parts.append(Part(2.0 * tokens * arguments["out_features"] * arguments["in_features"], weight))
    flags, factors = arguments["need_lora"], [*arguments["lora_A"], *arguments["lora_B"]]
    return parts + _lora_backward(tokens, factors, [places.take(flag) for flag in flags], x)


def _lora_backward(
    tokens: float, factors: Sequence[Tensor], gradients: Sequence[tuple[int, ...]], x: tuple[int, ...]
) -> Parts:
    """``factors`` is every A, then every B; ``gradients`` and ``x`` are positions among the outputs."""
    count = len(factors) // 2
    parts = []
    for lora_A, lora_B, grad_A, grad_B in zip(
        factors[:count], factors[count:], gradients[:count], gradients[count:], strict=True
    ):
        through_A, through_B = 2.0 * tokens * lora_A.numel(), 2.0 * tokens * lora_B.numel()
        work = ((through_B, (*x, *grad_A)), (through_A, x), (through_A, grad_A), (through_B, grad_B))
        parts += [Part(flops, outputs) for flops, outputs in work if outputs]
    return parts


def _members(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each member of a group, as `_product` takes them, and its factors."""
    ends = [0, *accumulate(arguments["adapters"])]
    return [
        {
            "format": arguments["format"][index],
            "out_features": arguments["out_features"][index],
            "in_features": arguments["in_features"][index],
            "factors": [*arguments["lora_A"][begin:end], *arguments["lora_B"][begin:end]],
            "bias": arguments["bias"][index],
        }
        for index, (begin, end) in enumerate(pairwise(ends))
    ]


def _group(arguments: Mapping[str, Any], _out: Any) -> Parts:
    tokens = _rows(arguments["x"])
    flops = 0.0
    for member in _members(arguments):
        bias = 0.0 if member["bias"] is None else tokens * member["out_features"]
        flops += _product(tokens, member) + _lora_forward(tokens, member["factors"]) + bias
    return [Part(flops)]


def _group_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    places = _Places()
    x = places.take(arguments["need_x"])
    flags = iter(arguments["need_lora"])
    parts: Parts = []
    for member, grad in zip(_members(arguments), arguments["grads"], strict=True):
        gradients = [places.take(next(flags) and grad is not None) for _factor in member["factors"]]
        if grad is None:
            continue
        tokens = _rows(grad)
        parts += [Part(_product(tokens, member), x)] if x else []
        parts += _lora_backward(tokens, member["factors"], gradients, x)
    return parts


def _sparse_delta(arguments: Mapping[str, Any], _out: Any) -> Parts:
    return [Part(2.0 * _rows(arguments["x"]) * arguments["values"].numel())]


def _sparse_delta_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    flops, places = 2.0 * _rows(arguments["grad"]) * arguments["values"].numel(), _Places()
    wanted = [places.take(arguments[name]) for name in ("need_x", "need_values")]
    return [Part(flops, outputs) for outputs in wanted if outputs]


def _silu_mul(_arguments: Mapping[str, Any], out: Any) -> Parts:
    return [Part(2 * _largest(out))]


def _silu_mul_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    places = _Places()
    wanted = [places.take(arguments[name]) for name in ("need_gate", "need_up")]
    return [Part(2 * _largest(arguments["gate"]), outputs) for outputs in wanted if outputs]


def _linear_cross_entropy(arguments: Mapping[str, Any], _out: Any) -> Parts:
    """The scores, and a product for each gradient that is made of them right away."""
    tokens = labelled_tokens(arguments["labels"], arguments["ignore_index"])
    product, lora_B = _product(tokens, arguments), arguments["lora_B"]
    low_rank = 0.0 if lora_B is None else 2.0 * tokens * lora_B.numel()
    gradients = {"hidden": product, "weight": product, "bias": 0.0, "inner": low_rank, "lora_B": low_rank}
    return [Part(product + low_rank)] + [
        Part(flops, (index,), of_gradients=True)
        for index, (name, flops) in enumerate(gradients.items(), 1)
        if flops and arguments[f"need_{name}"]
    ]


def _norm(arguments: Mapping[str, Any], out: Any) -> Parts:
    adds_residual = arguments["residual"] is not None
    return [Part((_RMS_NORM + adds_residual) * out[0].numel())]


def _norm_operator_backward(arguments: Mapping[str, Any], _out: Any) -> Parts:
    places = _Places()
    wanted = [places.take(arguments[name]) for name in ("need_x", "need_weight", "need_bias")]
    each = zip(_LAYER_NORM, wanted, strict=True)
    return [Part(flops * _largest(arguments["total"]), outputs) for flops, outputs in each if outputs]


def _rotary(_arguments: Mapping[str, Any], out: Any) -> Parts:
    return [Part(3 * turned.numel(), (index,)) for index, turned in enumerate(out)]


_FORMULAS: Mapping[str, Formula] = {
    "aten::native_layer_norm_backward": _norm_backward,
    "aten::_fused_rms_norm_backward": _norm_backward,
    "aten::convolution_backward": _convolution_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_grouped_mm": _grouped_product,
    "bitsandbytes::dequantize_4bit": _output_elements,
    "bitsandbytes::dequantize_blockwise": _output_elements,
    "bitsandbytes::gemm_4bit": _packed_product,
    "bitsandbytes::gemv_4bit": _packed_product,
    "bitsandbytes::int8_vectorwise_quant": _input_elements,
    "bitsandbytes::int8_mm_dequant": _output_elements,
    "bitsandbytes::int8_linear_matmul": _int8_product,
    "bitsandbytes::int8_scaled_mm": _int8_product,
    "peftkern::attention": _attention,
    "peftkern::attention_backward": _our_attention_backward,
    "peftkern::dequantize": _output_elements,
    "peftkern::quantize": _input_elements,
    "peftkern::lora_linear": _linear,
    "peftkern::lora_linear_backward": _linear_backward,
    "peftkern::masked_linear": _linear,
    "peftkern::masked_linear_backward": _linear_backward,
    "peftkern::lora_linear_group": _group,
    "peftkern::lora_linear_group_backward": _group_backward,
    "peftkern::sparse_delta": _sparse_delta,
    "peftkern::sparse_delta_backward": _sparse_delta_backward,
    "peftkern::linear_cross_entropy": _linear_cross_entropy,
    "peftkern::norm": _norm,
    "peftkern::norm_backward": _norm_operator_backward,
    "peftkern::rotary": _rotary,
    "peftkern::silu_mul": _silu_mul,
    "peftkern::silu_mul_backward": _silu_mul_backward,
}
