"""Number formats and index sets: codebooks, blocks, packing, double quantization; masks and sparse entries."""

from peftkern.formats.bit_mask import BitMask, group_mask, largest_mask, random_group_mask, random_mask
from peftkern.formats.codebooks import DYNAMIC_8BIT, DYNAMIC_8BIT_UNSIGNED, FP4, NF4, codebook
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
    "DYNAMIC_8BIT_UNSIGNED",
    "FORMATS",
    "FOUR_BIT_FORMATS",
    "FP4",
    "NF4",
    "VALUE_DTYPES",
    "BitMask",
    "DoubleQuantization",
    "QuantizedTensor",
    "SparseIndices",
    "codebook",
    "group_mask",
    "largest_mask",
    "packed_shape",
    "random_group_mask",
    "random_mask",
    "scales_shape",
]
