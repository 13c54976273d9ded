"""What modules whose frozen weight stays quantized have in common: memory, moves, casts and the state dict.

The state dict has bitsandbytes' keys (:mod:`peftkern.formats.bitsandbytes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftkern.formats import DoubleQuantization, QuantizedTensor
from peftkern.formats.bitsandbytes import COMPANION_KEYS, read_weight, write_companions
from peftkern.nn.packed_weight import PackedWeight
from peftkern.ops.dequantize import dequantize

SCALES = ("scales", "scales_absmax", "scales_offset")
"""Names of the buffers beside the weight; the last two exist with double quantization only."""


class QuantizedModule(nn.Module):
    """A module with a frozen quantized matrix as its ``weight``.

    Attributes:
        weight: ``PackedWeight``, uint8 or int8, in the layout of ``QuantizedTensor.packed``; never asks for a gradient.
        scales, scales_absmax, scales_offset: buffers, as in ``QuantizedTensor``. Casts of the module to another
            floating-point dtype leave them and the codes as they are.
        format, block_size, scales_block_size: of the quantized weight; ``scales_block_size`` is 0 without double
            quantization.
        weight_dtype: dtype of the weight that was quantized, which ``dequantize()`` gives back.
    """

    weight: Tensor
    scales: Tensor
    scales_absmax: Tensor | None
    scales_offset: Tensor | None

    sides: ClassVar[tuple[str, str]]
    """Names of the attributes with the numbers of rows and columns."""
    dense_class: ClassVar[type[nn.Module]]
    """What the module is without quantization."""

    @classmethod
    def convert_(cls, module: nn.Module, quantized: QuantizedTensor) -> Self:
        """Turn ``module``, itself, into one of this class that holds ``quantized``.

        Its bias, hooks, training mode and everything that refers to it stay.

        Raises:
            ValueError: the class cannot hold ``quantized``; the module is as before.
        """
        cls.check(quantized)
        module.__class__ = cls
        assert isinstance(module, cls)
        module._install(quantized)
        return module

    @classmethod
    def check(cls, quantized: QuantizedTensor) -> None:
        """Raise `ValueError` where the class cannot hold ``quantized``."""
        quantized.validate()
        if len(quantized.shape) != 2:
            expected = ", ".join(cls.sides)
            raise ValueError(f"{cls.__name__}: quantized must be [{expected}], got {list(quantized.shape)}")

    def _install(self, quantized: QuantizedTensor) -> None:
        nested = quantized.double_quantization
        for name, size in zip(self.sides, quantized.shape, strict=True):
            setattr(self, name, size)
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

    def _shape(self) -> list[int]:
        return [getattr(self, name) for name in self.sides]

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
        shape = torch.Size(self._shape())
        packed = self.weight.detach()
        return QuantizedTensor(packed, self.scales, self.format, shape, self.weight_dtype, self.block_size, nested)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in ``dtype`` or in the dtype it was quantized from."""
        return dequantize(self.quantized, dtype)

    def dequantize_(self, dtype: torch.dtype | None = None) -> Any:
        """Turn the module, itself, into a dense one, ``nn.Linear`` or ``nn.Embedding``, whose weight stays frozen."""
        dense = self.dequantize(dtype)
        for name in SCALES:
            del self._buffers[name]
        for name in ("format", "block_size", "scales_block_size", "weight_dtype", "_view"):
            del self.__dict__[name]
        self.__class__ = self.dense_class  # type: ignore[assignment]
        self.weight = nn.Parameter(dense, requires_grad=False)
        return self

    def replace_(self, quantized: QuantizedTensor) -> None:
        """Hold another weight of the same shape, of any format, without a copy.

        Raises:
            ValueError: ``quantized`` is not consistent, has another shape or is on another device.
        """
        self.check(quantized)
        if list(quantized.shape) != self._shape():
            raise ValueError(f"replace_: quantized must be {self._shape()}, got {list(quantized.shape)}")
        if quantized.device != self.weight.device:
            raise ValueError(f"replace_: the module is on {self.weight.device}, quantized on {quantized.device}")
        self._install(quantized)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        codes, scales = self.weight.data, {name: self._buffers.get(name) for name in SCALES}
        with self._unlocked_weight():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.weight.dtype != codes.dtype:
                self.weight.data = codes.to(self.weight.device)
        for name, before in scales.items():
            after = self._buffers.get(name)
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

    def _values(self) -> dict[str, Tensor]:
        """What the state dict holds of the weight."""
        # on the meta device there is nothing yet for the companions to describe
        return {"weight": self.weight, **({} if self.scales.is_meta else write_companions(self._make_view()))}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        values, bias = self._values(), self._parameters.get("bias")
        if bias is not None:
            values["bias"] = bias
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
        self._load_weight(state_dict, prefix, local_metadata, missing_keys, error_msgs)

    def _load_weight(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
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
        if list(loaded.shape) != self._shape():
            sizes = f"the module is {self._shape()} and the checkpoint {list(loaded.shape)}"
            raise ValueError(f"{key}: size mismatch, {sizes}")
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
