"""Quantized number formats: codebooks, blocks, packing, double quantization."""

from peftkern.formats.codebooks import DYNAMIC_8BIT, FP4, NF4, codebook
from peftkern.formats.quantized_tensor import (
    BLOCK_SIZES,
    FORMATS,
    FOUR_BIT_FORMATS,
    VALUE_DTYPES,
    DoubleQuantization,
    QuantizedTensor,
    packed_shape,
    scales_shape,
)
from peftkern.formats.sparse_indices import SparseIndices

__all__ = [
    "BLOCK_SIZES",
    "DYNAMIC_8BIT",
    "FORMATS",
    "FOUR_BIT_FORMATS",
    "FP4",
    "NF4",
    "VALUE_DTYPES",
    "DoubleQuantization",
    "QuantizedTensor",
    "SparseIndices",
    "codebook",
    "packed_shape",
    "scales_shape",
]
