"""Quantized tensors: codes, and scales that blocks of codes are multiplied with.

A block is ``block_size`` consecutive elements in row-major order; the last one may be shorter. For rows that are whole
blocks, codes and scales keep the tensor's leading dimensions, so that a slice along dimension 0 is a valid tensor.

Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), section 3; LLM.int8(), Dettmers et al. 2022 (arXiv:2208.07339),
section 3.1; the byte layout is that of bitsandbytes 0.50.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern.formats.codebooks import codebook

FORMATS = frozenset({"nf4", "fp4", "int8", "int8_blockwise"})
FOUR_BIT_FORMATS = frozenset({"nf4", "fp4"})
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def block_count(elements: int, block_size: int) -> int:
    """Number of blocks that ``elements`` fill, the last one perhaps in part."""
    return -(-elements // block_size)


def has_whole_blocks(shape: torch.Size, block_size: int) -> bool:
    """Whether each row (along the last dimension) is a whole number of blocks."""
    return len(shape) > 0 and shape[-1] % block_size == 0


def packed_shape(shape: torch.Size, format: str, block_size: int) -> torch.Size:
    """Shape of ``packed``: [..., in/2] for 4 bits and whole blocks, else [ceil(numel/2)]; for 8 bits ``shape``."""
    if format not in FOUR_BIT_FORMATS:
        return shape
    if has_whole_blocks(shape, block_size):
        return torch.Size((*shape[:-1], shape[-1] // 2))
    return torch.Size((block_count(shape.numel(), 2),))


def scales_shape(shape: torch.Size, format: str, block_size: int) -> torch.Size:
    """Shape of ``scales``: [out] for int8, [..., in/block] for whole blocks, else [ceil(numel/block)]."""
    if format == "int8":
        return shape[:-1]
    if has_whole_blocks(shape, block_size):
        return torch.Size((*shape[:-1], shape[-1] // block_size))
    return torch.Size((block_count(shape.numel(), block_size),))


@dataclass(frozen=True, eq=False)
class DoubleQuantization:
    """How to decode scales that are 8-bit codes: ``scale = dynamic[code] * absmax[block] + offset``.

    Attributes:
        absmax: [ceil(scales/block_size)] float32, one per block of scales.
        offset: [] float32, the mean of the scales.
        block_size: scales per block.
    """

    absmax: Tensor
    offset: Tensor
    block_size: int = 256


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as codes and scales. It is plain data: :func:`peftkern.ops.dequantize` turns it back into numbers.

    Attributes:
        packed: the codes. nf4, fp4: uint8, two codes a byte, the element with the even index in the high nibble,
            [..., in/2] where ``in`` is a multiple of ``block_size`` and else [ceil(numel/2)]. int8: int8 [out, in].
            int8_blockwise: uint8 of ``shape``.
        scales: the greatest magnitude of each block; float32, or uint8 codes with ``double_quantization``.
            [..., in/block_size] where ``in`` is a multiple of ``block_size`` and else [ceil(numel/block_size)];
            int8: [out], and a value is code * scale / 127.
        format: ``"nf4"``, ``"fp4"``, ``"int8"`` (one scale per row) or ``"int8_blockwise"`` (dynamic codebook).
        shape: of the dequantized tensor.
        dtype: of the dequantized tensor; float32, bfloat16 or float16.
        block_size: elements per scale; one of ``BLOCK_SIZES``, for int8 the length of a row.
        double_quantization: how to decode uint8 ``scales``, or ``None`` for float32 ones.
    """

    packed: Tensor
    scales: Tensor
    format: str
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    double_quantization: DoubleQuantization | None = None

    @property
    def device(self) -> torch.device:
        """Where ``packed``, and with it everything else, is."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and what decodes the scales."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on ``device``."""
        nested = self.double_quantization
        if nested is not None:
            nested = replace(nested, absmax=nested.absmax.to(device), offset=nested.offset.to(device))
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device), double_quantization=nested)

    def scale_values(self) -> Tensor:
        """The scales as float32, in the shape of ``scales``; double quantization is undone."""
        nested = self.double_quantization
        if nested is None:
            return self.scales
        absmax = nested.absmax.repeat_interleave(nested.block_size)[: self.scales.numel()]
        return self._decode_scales(self.scales, absmax, nested.offset)

    def _decode_scales(self, codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
        # The product is rounded to float32 before the offset is added: a fused multiply-add would change bits.
        values = codebook("int8_blockwise", self.device).index_select(0, codes.reshape(-1).int())
        return values.mul_(absmax.reshape(-1)).add_(offset).view(codes.shape)

    @property
    def has_own_rows(self) -> bool:
        """Whether no block, and no byte of codes, has a part in two rows."""
        return self.format == "int8" or has_whole_blocks(self.shape, self.block_size)

    def with_plain_scales(self) -> QuantizedTensor:
        """The same tensor without double quantization: its scales in float32."""
        return replace(self, scales=self.scale_values(), double_quantization=None)

    def rows(self, first: int, end: int) -> QuantizedTensor:
        """The rows from ``first`` to below ``end`` of a matrix, in its own memory.

        Raises:
            ValueError: rows share blocks (`has_own_rows`), or their scales are quantized (`with_plain_scales`).
        """
        if not self.has_own_rows or self.double_quantization is not None:
            raise ValueError(
                "rows: rows must be whole blocks and scales plain; dequantize the whole, or see has_own_rows"
            )
        packed, scales = self.packed[first:end], self.scales[first:end]
        return replace(self, packed=packed, scales=scales, shape=torch.Size((len(packed), self.shape[1])))

    def take(self, rows: Tensor) -> QuantizedTensor:
        """A copy of the rows of a matrix that have these indices, [count]; their scales are plain.

        Raises:
            ValueError: rows share blocks (`has_own_rows`).
        """
        if not self.has_own_rows:
            raise ValueError("take: rows must be whole blocks; dequantize the whole, or see has_own_rows")
        packed, scales = self.packed.index_select(0, rows), self.scales.index_select(0, rows)
        nested = self.double_quantization
        if nested is not None:
            first = rows[:, None] * self.scales.shape[1]
            places = first + torch.arange(self.scales.shape[1], device=self.device)
            scales = self._decode_scales(scales, nested.absmax[places // nested.block_size], nested.offset)
        shape = torch.Size((packed.shape[0], self.shape[1]))
        return replace(self, packed=packed, scales=scales, shape=shape, double_quantization=None)

    def validate(self) -> None:
        """Check that the fields fit together. Looks at types, shapes and devices, never at the data.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field has the wrong dtype, shape, device or value; the message names it.
        """
        self._validate_options()
        self._validate_tensors()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"packed": self.packed, "scales": self.scales}
        if self.double_quantization is not None:
            tensors["double_quantization.absmax"] = self.double_quantization.absmax
            tensors["double_quantization.offset"] = self.double_quantization.offset
        return tensors

    def _validate_options(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"QuantizedTensor: format must be one of {sorted(FORMATS)}, got {self.format!r}")
        if not isinstance(self.shape, torch.Size):
            raise TypeError(f"QuantizedTensor: shape must be a torch.Size, got {type(self.shape).__name__}")
        if self.dtype not in VALUE_DTYPES:
            raise ValueError(f"QuantizedTensor: dtype must be float32, bfloat16 or float16, got {self.dtype}")
        nested = self.double_quantization
        if nested is not None and not isinstance(nested, DoubleQuantization):
            kind = type(nested).__name__
            raise TypeError(f"QuantizedTensor: double_quantization must be a DoubleQuantization or None, got {kind}")
        if nested is not None and nested.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"QuantizedTensor: double_quantization.block_size must be one of {BLOCK_SIZES}, got {nested.block_size}"
            )
        if self.format == "int8":
            self._validate_int8_options()
        elif not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"QuantizedTensor: block_size must be one of {BLOCK_SIZES}, got {self.block_size}")

    def _validate_int8_options(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"QuantizedTensor: shape must be [out, in] for int8, got {list(self.shape)}")
        if self.shape[1] == 0:
            raise ValueError(
                f"QuantizedTensor: shape must have at least one column for int8, which has one scale per row; "
                f"got {list(self.shape)}"
            )
        if self.block_size != self.shape[1]:
            raise ValueError(
                f"QuantizedTensor: block_size must be the length of a row, {self.shape[1]}, for int8; "
                f"got {self.block_size}"
            )
        if self.double_quantization is not None:
            raise ValueError("QuantizedTensor: double_quantization must be None for int8: it has one scale per row")

    def _validate_tensors(self) -> None:
        for name, tensor in self._tensors().items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"QuantizedTensor: {name} must be a tensor, got {type(tensor).__name__}")
            if tensor.layout != torch.strided:
                raise ValueError(f"QuantizedTensor: {name} must be dense, got {tensor.layout}")
            if tensor.device != self.packed.device:
                devices = f"{name} is on {tensor.device} and packed on {self.packed.device}"
                raise ValueError(f"QuantizedTensor: {devices}; move one of them")
        nested = self.double_quantization
        _check(
            "packed",
            self.packed,
            torch.int8 if self.format == "int8" else torch.uint8,
            packed_shape(self.shape, self.format, self.block_size),
        )
        _check(
            "scales",
            self.scales,
            torch.float32 if nested is None else torch.uint8,
            scales_shape(self.shape, self.format, self.block_size),
        )
        if nested is not None:
            blocks = block_count(self.scales.numel(), nested.block_size)
            _check("double_quantization.absmax", nested.absmax, torch.float32, torch.Size((blocks,)))
            _check("double_quantization.offset", nested.offset, torch.float32, torch.Size(()))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"QuantizedTensor: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"QuantizedTensor: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
