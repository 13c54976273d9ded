"""A linear layer whose frozen weight stays quantized.

    y = x dequantize(W)ᵀ + b

PEFT takes it for the ``nn.Linear`` it is and builds an ordinary LoRA layer over it. Its state dict has bitsandbytes'
keys (:mod:`peftkern.formats.bitsandbytes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats import DoubleQuantization, QuantizedTensor, packed_shape, scales_shape
from peftkern.formats.bitsandbytes import COMPANION_KEYS, read_weight, write_companions
from peftkern.formats.quantized_tensor import block_count
from peftkern.nn.packed_weight import PackedWeight
from peftkern.ops.dequantize import dequantize
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.quantize import SCALES_BLOCK_SIZE, quantize

SCALES = ("scales", "scales_absmax", "scales_offset")
"""Names of the buffers beside the weight; the last two exist with double quantization only."""


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` with a frozen quantized weight.

    Attributes:
        weight: ``PackedWeight``, uint8 or int8, in the layout of ``QuantizedTensor.packed``; never asks for a gradient.
        scales, scales_absmax, scales_offset: buffers, as in ``QuantizedTensor``. Casts of the module to another
            floating-point dtype leave them and the codes as they are, and cast the bias.
        bias: [out] or ``None``.
        format, block_size, scales_block_size: of the quantized weight; ``scales_block_size`` is 0 without double
            quantization.
        weight_dtype: dtype of the weight that was quantized, which ``dequantize()`` gives back.
    """

    scales: Tensor
    scales_absmax: Tensor | None
    scales_offset: Tensor | None

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None = None) -> None:
        """Takes over ``quantized``, [out, in], without a copy, and ``bias``, [out].

        Raises:
            ValueError: ``quantized`` is not two-dimensional or not consistent, or ``bias`` does not fit it.
        """
        nn.Module.__init__(self)
        quantized.validate()
        if len(quantized.shape) != 2:
            raise ValueError(f"QuantizedLinear: quantized must be [out, in], got {list(quantized.shape)}")
        if bias is not None and tuple(bias.shape) != (quantized.shape[0],):
            raise ValueError(f"QuantizedLinear: bias must be [{quantized.shape[0]}], got {list(bias.shape)}")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self._install(quantized)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "nf4", block_size: int = 64, double_quant: bool = False
    ) -> QuantizedLinear:
        """A quantized copy of ``linear`` that shares its bias.

        Raises:
            ValueError, TypeError: as :func:`peftkern.ops.quantize` does.
        """
        module = cls(quantize(linear.weight.detach(), format, block_size, double_quant), linear.bias)
        return module.train(linear.training)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        *,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        device: torch.device | str | None = None,
    ) -> QuantizedLinear:
        """A module of uninitialized memory, to be filled by ``load_state_dict``; ``device="meta"`` allocates none.

        Raises:
            ValueError: no such ``format`` or ``block_size``.
        """
        quantized = _empty(torch.Size((out_features, in_features)), dtype, format, block_size, double_quant, device)
        return cls(quantized, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def convert_(cls, linear: nn.Module, quantized: QuantizedTensor) -> QuantizedLinear:
        """Turn ``linear``, itself, into a ``QuantizedLinear`` that holds ``quantized``.

        Its bias, hooks, training mode and everything that refers to it stay.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._install(quantized)
        return linear

    def _install(self, quantized: QuantizedTensor) -> None:
        nested = quantized.double_quantization
        self.out_features, self.in_features = quantized.shape
        self.format = quantized.format
        self.block_size = quantized.block_size
        self.scales_block_size = nested.block_size if nested else 0
        self.weight_dtype = quantized.dtype
        self.weight = PackedWeight(quantized.packed)
        # Persistent by registration, because loaders treat non-persistent buffers as values they may overwrite.
        self.register_buffer("scales", quantized.scales)
        self.register_buffer("scales_absmax", nested.absmax if nested else None)
        self.register_buffer("scales_offset", nested.offset if nested else None)
        self._view: tuple[Tensor, int, Tensor, QuantizedTensor] | None = None

    # ---- the weight

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight. It shares the module's memory and is made anew when that was replaced or moved."""
        if torch.compiler.is_compiling():  # addresses mean nothing to a tracer, and views must not outlive the trace
            return self._make_view()
        weight, scales = self.weight, self.scales
        # A sharded weight has no single address; FSDP puts a plain parameter in its place before the layer runs.
        address = weight.data_ptr() if type(weight) in (PackedWeight, nn.Parameter) else 0
        view = self._view
        if view is None or view[0] is not weight or view[1] != address or view[2] is not scales:
            self._view = view = (weight, address, scales, self._make_view())
        return view[3]

    def _make_view(self) -> QuantizedTensor:
        nested = None
        if self.scales_absmax is not None and self.scales_offset is not None:
            nested = DoubleQuantization(self.scales_absmax, self.scales_offset, self.scales_block_size)
        shape = torch.Size((self.out_features, self.in_features))
        packed = self.weight.detach()
        return QuantizedTensor(packed, self.scales, self.format, shape, self.weight_dtype, self.block_size, nested)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, [out, in], in ``dtype`` or in the dtype it was quantized from."""
        return dequantize(self.quantized, dtype)

    def dequantize_(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Turn the module, itself, into a dense ``nn.Linear``, whose weight stays frozen."""
        dense = self.dequantize(dtype)
        for name in SCALES:
            del self._buffers[name]
        for name in ("format", "block_size", "scales_block_size", "weight_dtype", "_view"):
            del self.__dict__[name]
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = nn.Parameter(dense, requires_grad=False)
        return self

    def replace_(self, quantized: QuantizedTensor) -> None:
        """Hold another weight of the same shape, of any format, without a copy.

        Raises:
            ValueError: ``quantized`` is not consistent, has another shape or is on another device.
        """
        quantized.validate()
        if tuple(quantized.shape) != (self.out_features, self.in_features):
            expected = [self.out_features, self.in_features]
            raise ValueError(f"replace_: quantized must be {expected}, got {list(quantized.shape)}")
        if quantized.device != self.weight.device:
            raise ValueError(f"replace_: the module is on {self.weight.device}, quantized on {quantized.device}")
        self._install(quantized)

    @torch.no_grad()
    def merge_(self, delta: Tensor) -> float:
        """Add ``delta``, [out, in] floating point, to the dense weight and quantize the sum in the same format.

        Returns:
            The relative error that requantizing adds: ``‖Q(W + Δ) − (W + Δ)‖ / ‖W + Δ‖``.

        Raises:
            ValueError: ``delta`` has another shape, or the sum is not finite; the weight is as before.
        """
        if tuple(delta.shape) != (self.out_features, self.in_features):
            expected = [self.out_features, self.in_features]
            raise ValueError(f"merge_: delta must be {expected}, got {list(delta.shape)}")
        merged = self.dequantize(torch.float32).add_(delta)
        quantized = quantize(merged, self.format, self.block_size, self.scales_block_size > 0)
        error = (dequantize(quantized) - merged).norm() / merged.norm()
        self._install(dataclasses.replace(quantized, dtype=self.weight_dtype))
        return float(error.nan_to_num())

    def forward(self, input: Tensor) -> Tensor:
        return lora_linear(input, self.quantized, bias=self.bias)

    # ---- what PEFT asks a quantized layer for

    @property
    def compute_dtype(self) -> torch.dtype:
        """PEFT creates adapters in this dtype, where the dtype of ``weight`` is no floating-point one."""
        return self.weight_dtype

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed codes. By this name PEFT knows a module whose ``dequantize()`` it calls, for example for DoRA."""
        return self.weight

    # ---- moving, casting, copying

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        codes, scales = self.weight.data, {name: self._buffers[name] for name in SCALES}
        with self._unlocked_weight():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.weight.dtype != codes.dtype:
                self.weight.data = codes.to(self.weight.device)
        for name, before in scales.items():
            after = self._buffers[name]
            if before is not None and after is not None and before.dtype != after.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _unlocked_weight(self) -> AbstractContextManager[None]:
        # FSDP replaces the parameter by a distributed one while the weight is sharded.
        return self.weight.unlocked() if isinstance(self.weight, PackedWeight) else nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if type(self.weight) is nn.Parameter:  # which is how pickle restores every kind of parameter
            self.weight = PackedWeight(self.weight)

    # ---- state dict

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        values: dict[str, Tensor] = {"weight": self.weight}
        if self.bias is not None:
            values["bias"] = self.bias
        if not self.scales.is_meta:  # on the meta device there is nothing yet for the companions to describe
            values.update(write_companions(self._make_view()))
        for name, value in values.items():
            destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The parent loads the bias and finds unexpected keys; it must not see the weight, whose shape is not its own.
        hidden = {prefix + name for name in ("weight", *COMPANION_KEYS, *SCALES)}
        rest = {key: value for key, value in state_dict.items() if key not in hidden}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key not in hidden)
        if strict:
            unexpected_keys.extend(prefix + name for name in SCALES if prefix + name in state_dict)
        key = f"{prefix}weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        companions = {name: state_dict[prefix + name] for name in COMPANION_KEYS if prefix + name in state_dict}
        try:
            loaded = read_weight(state_dict[key].detach(), companions, key, self.weight_dtype)
            self._load(loaded, key, assign=local_metadata.get("assign_to_params_buffers", False))
        except ValueError as error:
            error_msgs.append(str(error))

    @torch.no_grad()
    def _load(self, loaded: QuantizedTensor, key: str, assign: bool) -> None:
        if tuple(loaded.shape) != (self.out_features, self.in_features):
            expected = [self.out_features, self.in_features]
            raise ValueError(f"{key}: size mismatch, the module is {expected} and the checkpoint {list(loaded.shape)}")
        mine = self._make_view()
        if assign:
            self._install(loaded)
        elif self.weight.is_meta or _description(mine) != _description(loaded):
            self._install(_copy(loaded, self.weight.device))
        else:
            for old, new in zip(_tensors(mine), _tensors(loaded), strict=True):
                old.copy_(new)

    def extra_repr(self) -> str:
        described = f"{super().extra_repr()}, format={self.format}"
        if self.format != "int8":
            described += f", block_size={self.block_size}, double_quant={self.scales_block_size > 0}"
        return described


def _empty(
    shape: torch.Size,
    dtype: torch.dtype,
    format: str,
    block_size: int,
    double_quant: bool,
    device: torch.device | str | None,
) -> QuantizedTensor:
    block_size = shape[1] if format == "int8" else block_size
    codes = torch.int8 if format == "int8" else torch.uint8
    packed = torch.empty(packed_shape(shape, format, block_size), dtype=codes, device=device)
    scales_dtype = torch.uint8 if double_quant else torch.float32
    scales = torch.empty(scales_shape(shape, format, block_size), dtype=scales_dtype, device=device)
    nested = None
    if double_quant:
        absmax = torch.empty(block_count(scales.numel(), SCALES_BLOCK_SIZE), dtype=torch.float32, device=device)
        nested = DoubleQuantization(absmax, torch.empty((), dtype=torch.float32, device=device), SCALES_BLOCK_SIZE)
    return QuantizedTensor(packed, scales, format, shape, dtype, block_size, nested)


def _tensors(quantized: QuantizedTensor) -> list[Tensor]:
    nested = quantized.double_quantization
    return [quantized.packed, quantized.scales, *((nested.absmax, nested.offset) if nested else ())]


def _description(quantized: QuantizedTensor) -> tuple[Any, ...]:
    return quantized.format, quantized.block_size, quantized.dtype, [(t.shape, t.dtype) for t in _tensors(quantized)]


def _copy(quantized: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    packed, scales, *rest = (tensor.to(device, copy=True) for tensor in _tensors(quantized))
    nested = quantized.double_quantization
    if nested is not None:
        nested = dataclasses.replace(nested, absmax=rest[0], offset=rest[1])
    return dataclasses.replace(quantized, packed=packed, scales=scales, double_quantization=nested)
