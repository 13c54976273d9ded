"""The operations: what each one means, its checks, and a reference in plain PyTorch."""

from peftkern.ops.adamw import adamw_, adamw_8bit_, adamw_8bit_probe_, adamw_probe_
from peftkern.ops.attention import attention
from peftkern.ops.dequantize import dequantize
from peftkern.ops.dora_linear import dora_linear
from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.importance import accumulate_importance_, importance_dot, probe_dot
from peftkern.ops.linear_cross_entropy import label_logprobs, linear_cross_entropy
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.lora_linear_group import lora_linear_group
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.masked_linear import masked_linear
from peftkern.ops.mixed_lora_linear import mixed_lora_linear
from peftkern.ops.norm import layer_norm, rms_norm
from peftkern.ops.quantize import quantize
from peftkern.ops.rotary import rotary
from peftkern.ops.select_top import quantile_of, select_top
from peftkern.ops.silu_mul import silu_mul
from peftkern.ops.sparse_delta_linear import add_sparse_delta, sparse_delta_linear

__all__ = [
    "accumulate_importance_",
    "adamw_",
    "adamw_8bit_",
    "adamw_8bit_probe_",
    "adamw_probe_",
    "add_sparse_delta",
    "attention",
    "dequantize",
    "dora_linear",
    "gated_lora_linear",
    "importance_dot",
    "label_logprobs",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "masked_linear",
    "mixed_lora_linear",
    "probe_dot",
    "quantile_of",
    "quantize",
    "rms_norm",
    "rotary",
    "select_top",
    "silu_mul",
    "sparse_delta_linear",
]
