"""A linear layer whose frozen weight stays quantized.

    y = x dequantize(W)ᵀ + b

PEFT takes it for the ``nn.Linear`` it is and builds an ordinary LoRA layer over it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern.formats import DoubleQuantization, QuantizedTensor, packed_shape, scales_shape
from peftkern.formats.quantized_tensor import block_count
from peftkern.nn.quantized_module import QuantizedModule
from peftkern.ops.dequantize import dequantize
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.quantize import SCALES_BLOCK_SIZE, quantize


class QuantizedLinear(QuantizedModule, nn.Linear):
    """``nn.Linear`` with a frozen quantized weight, [out, in], and a bias, [out] or ``None``, which casts act upon."""

    sides: ClassVar[tuple[str, str]] = ("out_features", "in_features")
    dense_class: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None = None) -> None:
        """Takes over ``quantized``, [out, in], without a copy, and ``bias``, [out].

        Raises:
            ValueError: ``quantized`` is not two-dimensional or not consistent, or ``bias`` does not fit it.
        """
        nn.Module.__init__(self)
        self.check(quantized)
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

    @torch.no_grad()
    def merge_(self, delta: Tensor) -> float:
        """Add ``delta``, [out, in] floating point, to the dense weight and quantize the sum in the same format.

        Returns:
            The relative error that requantizing adds: ``‖Q(W + Δ) − (W + Δ)‖ / ‖W + Δ‖``.

        Raises:
            ValueError: ``delta`` has another shape, or the sum is not finite; the weight is as before.
        """
        if list(delta.shape) != self._shape():
            raise ValueError(f"merge_: delta must be {self._shape()}, got {list(delta.shape)}")
        merged, before = self.dequantize(torch.float32).add_(delta), self.quantized
        quantized = quantize(merged, before.format, before.block_size, before.double_quantization is not None)
        error = (dequantize(quantized) - merged).norm() / merged.norm()
        self._install(dataclasses.replace(quantized, dtype=self.weight_dtype))
        return float(error.nan_to_num())

    def forward(self, input: Tensor) -> Tensor:
        return lora_linear(input, self.quantized, bias=self.bias)


class TiedQuantizedLinear(QuantizedLinear):
    """A head whose weight is that of the embedding in front of the model, which holds the codes and scales of both.

    Its state dict has ``weight`` alone, as that of a dense head that is tied, and loading it is loading the embedding.
    """

    @classmethod
    def tie_(cls, linear: nn.Module, embedding: QuantizedModule) -> TiedQuantizedLinear:
        """Turn ``linear``, itself, into a head of ``embedding``, [vocabulary, hidden]; its bias and hooks stay."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.__dict__["_embedding"] = embedding  # beside the modules inside, of which it is none
        linear.out_features, linear.in_features = embedding.quantized.shape
        linear.weight = embedding.weight
        return linear

    @property
    def quantized(self) -> QuantizedTensor:
        """The embedding's weight."""
        quantized: QuantizedTensor = self.__dict__["_embedding"].quantized
        return quantized

    @property
    def weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the embedding."""
        return self.quantized.dtype

    def dequantize_(self, dtype: torch.dtype | None = None) -> Any:
        """Turn the module and its embedding, themselves, into dense ones, which stay tied."""
        embedding = self.__dict__.pop("_embedding")
        if isinstance(embedding, QuantizedModule):
            embedding.dequantize_(dtype)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight = embedding.weight
        return self

    def _install(self, quantized: QuantizedTensor) -> None:
        raise ValueError(
            "the head has its codes from the embedding, which would change with it; call dequantize_() first, or load "
            "the model with tie_word_embeddings=False"
        )

    def _values(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def _load_weight(self, *_arguments: Any) -> None:
        """The embedding loads it."""

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, tied to the embedding"


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
