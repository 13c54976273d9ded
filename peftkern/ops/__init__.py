"""The operations: what each one means, its checks, and a reference in plain PyTorch."""

from peftkern.ops.dequantize import dequantize
from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_linear_group import lora_linear_group
from peftkern.ops.masked_linear import masked_linear
from peftkern.ops.quantize import quantize
from peftkern.ops.silu_mul import silu_mul

__all__ = [
    "dequantize",
    "gated_lora_linear",
    "lora_linear",
    "lora_linear_group",
    "masked_linear",
    "quantize",
    "silu_mul",
]
