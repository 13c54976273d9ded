"""The frozen weight of a base layer, as the fused kernels take it.

A base layer is known by the `forward` of its class: that is what the fused path stands in for. A subclass that keeps
its parent's `forward` is taken like its parent, one that computes something else is refused.

The weight is read on every call, because PEFT (merging), FSDP and users replace it. Reading copies nothing: a view of
a bitsandbytes weight shares the memory of its packed data and scales.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftkern.formats import BLOCK_SIZES, DoubleQuantization, QuantizedTensor, codebook
from peftkern.nn.masked_linear import under_mask
from peftkern.nn.sparse_linear import under_deltas

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

REPACKED = (
    "bitsandbytes repacked this weight for inference on the CPU when it ran in evaluation mode without gradients; "
    "that form rounds the scales and loses the gradient of the input. Load the model again and patch it before its "
    "first evaluation"
)
EXACT_INT8 = "does not round activations to int8, as bitsandbytes does on a GPU and in evaluation mode"


class NotFused(Exception):  # noqa: N818 (a decision that reports show, not an error)
    """The fused path does not take this layer or call; the message is the reason that reports show."""


@dataclass(frozen=True)
class BaseKind:
    """A kind of base layer: how its weight is read, and what its users should know.

    ``swap`` says that the base layer itself gets a fused forward: it is quantized, and not by a module of ours.
    """

    read: Callable[[Any], Tensor | QuantizedTensor]
    swap: bool = False
    note: str = ""


_found: dict[type, BaseKind | None] = {}


Made = TypeVar("Made")


class LastMade(Generic[Made]):
    """What was last made of a weight, and the objects it was made of."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._made: Made | None = None

    def get(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What belongs to ``key``, made anew when one of the key's objects is another one than last time."""
        same = len(key) == len(self._key) and all(map(_same, key, self._key))
        if not same or self._made is None:
            self._made, self._key = make(), key
        return self._made


def _same(new: Any, old: Any) -> bool:
    # addresses are compared by value, everything else by identity
    return new is old or (type(new) is int and new == old)


def original_class(layer_class: type) -> type:
    """The class that a fused class was made of; any other class is its own original."""
    original: type = getattr(layer_class, "_peftkern_original", layer_class)
    return original


def read_weight(base: nn.Module) -> Tensor | QuantizedTensor:
    """The weight [out, in] of ``base``, without its mask and its sparse deltas.

    Raises:
        NotFused: the layer is of an unknown kind, or its weight is in a state that the kernels do not take.
    """
    kind = base_kind(original_class(type(base)))
    if kind is None:
        raise NotFused(f"the base layer {type(base).__name__} computes something of its own")
    return kind.read(base)


def base_kind(base_class: type) -> BaseKind | None:
    """What is known of an (original) class of base layers, whatever mask or deltas; ``None`` when nothing is."""
    base_class = under_mask(under_deltas(base_class))
    # no functools.cache, which torch.compile warns about
    if base_class not in _found:
        _found[base_class] = _find_kind(base_class)
    return _found[base_class]


def _find_kind(base_class: type) -> BaseKind | None:
    forward = getattr(base_class, "forward", None)
    for module_name, class_name, kind in _KINDS:
        module = sys.modules.get(module_name)
        if module is not None and getattr(module, class_name).forward is forward:
            return kind
    return None


KNOWN_TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor})
"""Fake ones take the operators' way, so that a model shows its real operators where nothing is computed."""


def _plain(tensor: Tensor | None, what: str) -> Tensor:
    # a distributed or otherwise special tensor needs its own dispatch, which raw pointers would bypass
    if tensor is None or type(tensor) not in KNOWN_TENSORS:
        raise NotFused(f"the {what} of the base layer is a {type(tensor).__name__}, not a plain tensor")
    return tensor


def read_frozen(base: Any, name: str) -> Tensor:
    """The dense parameter ``name`` of ``base``.

    Raises:
        NotFused: it is trained, or no plain floating-point tensor.
    """
    weight = _plain(getattr(base, name), name)
    if weight.requires_grad:
        raise NotFused("the base weight is trained itself; the fused path keeps it frozen")
    if weight.dtype not in DENSE_DTYPES:
        raise NotFused(f"the base weight has dtype {weight.dtype}, without its own layer to say what it means")
    return weight


def _read_dense(base: Any) -> Tensor:
    return read_frozen(base, "weight")


def _read_conv1d(base: Any) -> Tensor:
    # GPT-2's layer, x W + b with W [in, out]: a view, which the kernels read as it lies
    return _read_dense(base).t()


def _read_quantized_linear(base: Any) -> QuantizedTensor:
    quantized: QuantizedTensor = base.quantized
    return quantized


# ---- bitsandbytes


def _cache_of(base: Any) -> LastMade[QuantizedTensor]:
    state = base.__dict__.get("_peftkern")
    # under torch.compile addresses mean nothing, and a graph must not keep a view made while tracing
    return LastMade() if state is None or torch.compiler.is_compiling() else state.views


def _data_of(weight: nn.Parameter) -> tuple[Tensor, int]:
    """The tensor behind a parameter, and its address (0 where it has none)."""
    # bitsandbytes' parameters intercept every attribute in Python, at more than a microsecond each
    with torch._C.DisableTorchFunctionSubclass():
        data = weight.data
        return data, data.data_ptr() if type(data) is Tensor and not torch.compiler.is_compiling() else 0


def _read_bitsandbytes_4bit(base: Any) -> QuantizedTensor:
    weight = base.weight
    # FSDP drops the attributes of the parameter; the module keeps a second reference
    state = getattr(weight, "quant_state", None) or base.quant_state
    if state is None:
        raise NotFused("the weight is not quantized yet; move the layer to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise NotFused(REPACKED)
    data, address = _data_of(weight)
    key = (weight, address, state, state.absmax)
    return _cache_of(base).get(key, lambda: _view_4bit(data, state, base))


def _view_4bit(data: Tensor, state: Any, base: Any) -> QuantizedTensor:
    packed = _plain(data, "packed weight").view(torch.uint8)
    if tuple(state.shape) != (base.out_features, base.in_features):
        raise NotFused(f"bitsandbytes quantized the weight as {list(state.shape)}, not as [out, in]")
    if state.blocksize not in BLOCK_SIZES:
        raise NotFused(f"block size {state.blocksize} is not one of {sorted(BLOCK_SIZES)}")
    _check_codebook(state.code, state.quant_type)
    rows = _rows_are_whole_blocks(base, state.blocksize)
    nested = _double_quantization(state)
    scales = _plain(state.absmax, "scales")
    if scales.dtype != (torch.float32 if nested is None else torch.uint8):
        raise NotFused(f"the scales of the base layer are {scales.dtype}")
    return QuantizedTensor(
        packed=packed.reshape((base.out_features, -1) if rows else (-1,)),
        scales=scales.reshape((base.out_features, -1) if rows else (-1,)),
        format=state.quant_type,
        shape=torch.Size(state.shape),
        dtype=state.dtype,
        block_size=state.blocksize,
        double_quantization=nested,
    )


def _rows_are_whole_blocks(base: Any, block_size: int) -> bool:
    return bool(base.in_features % block_size == 0)


def _double_quantization(state: Any) -> DoubleQuantization | None:
    if not state.nested:
        return None
    _check_codebook(state.state2.code, "int8_blockwise")
    return DoubleQuantization(
        absmax=_plain(state.state2.absmax, "scales of scales"),
        offset=_plain(state.offset, "offset of scales").reshape(()),
        block_size=state.state2.blocksize,
    )


def _check_codebook(code: Tensor, format: str) -> None:
    if torch.compiler.is_compiling():  # a graph cannot compare values; `patch` has read this weight before
        return
    if not torch.equal(code.cpu(), codebook(format)):
        raise NotFused(f"the base layer has its own code table instead of {format}'s")


def _read_bitsandbytes_8bit(base: Any) -> QuantizedTensor:
    weight = base.weight
    if base.state.has_fp16_weights:
        raise NotFused("has_fp16_weights=True: bitsandbytes trains this weight and quantizes it in every call")
    # until the first forward of bitsandbytes the scales hang on the parameter, afterwards on the module's state;
    # merging makes a new parameter with scales of its own
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else base.state.SCB
    data, address = _data_of(weight)
    if data.dtype != torch.int8 or scales is None:
        raise NotFused("the weight is not quantized yet; move the layer to its device first")
    key = (weight, address, scales)
    return _cache_of(base).get(key, lambda: _view_8bit(data, scales))


def _view_8bit(data: Tensor, scales: Tensor) -> QuantizedTensor:
    return QuantizedTensor(
        packed=_plain(data, "weight"),
        scales=_plain(scales, "scales").reshape(-1),
        format="int8",
        shape=data.shape,
        dtype=torch.float32,
        block_size=data.shape[1],
    )


_KINDS = (
    ("torch.nn.modules.linear", "Linear", BaseKind(_read_dense)),
    ("transformers.pytorch_utils", "Conv1D", BaseKind(_read_conv1d)),
    ("peftkern.nn.quantized_linear", "QuantizedLinear", BaseKind(_read_quantized_linear)),
    ("bitsandbytes.nn.modules", "Linear4bit", BaseKind(_read_bitsandbytes_4bit, swap=True)),
    ("bitsandbytes.nn.modules", "Linear8bitLt", BaseKind(_read_bitsandbytes_8bit, swap=True, note=EXACT_INT8)),
)
