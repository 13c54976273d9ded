"""One decoder layer of the shape of Llama-3-8B, quantized and with adapters, by both sides, without memory.

Both sides are what users run: transformers' layer with NF4 weights (blocks of 64, double-quantized as the usual QLoRA
recipe has it) and PEFT's LoRA r=16 on all seven linear layers, without dropout; ours goes through ``peftkern.patch``
after that. The step is the forward and the backward pass, the gradient of the layer's input included, as in every layer
but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.bench import peers
from peftkern.bench.traffic.counter import Step, counting

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK_SIZE = 64
TOKENS = 2048

DEQUANTIZES_FROM = 1537
"""Tokens from which bitsandbytes 0.50.2 dequantizes the weight and multiplies, on NVIDIA GPUs of every kind, instead of
asking its table of kernels for few tokens."""

_ATTENTION = "peftkern_traffic_flash"


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder layer, under the names of transformers' ``LlamaConfig``."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int


LLAMA_3_8B = Shape(4096, 14336, 32, 8)


def peer_layer(shape: Shape, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's LoRA over bitsandbytes' 4-bit layers, in bfloat16."""
    return with_adapters(_decoder_layer(shape), bitsandbytes_linear, adapter_dtype)


def our_layer(shape: Shape, adapter_dtype: torch.dtype, recompute: str | None = None) -> nn.Module:
    """The same over our quantized layers, patched; ``recompute`` is as for `peftkern.patch`."""
    import peftkern
    from peftkern.backends.triton.launch import recording

    layer = with_adapters(_decoder_layer(shape), quantized_linear, adapter_dtype)
    with recording():  # as on a GPU
        peftkern.patch(layer, strict=True, recompute=recompute)
    return layer


def count_step(layer: nn.Module, shape: Shape, tokens: int = TOKENS) -> Step:
    """What one step of ``layer`` launches; what only the first step does, such as filling tables, is left out.

    Raises:
        ValueError: bitsandbytes would not run the code that is counted here.
    """
    if tokens < DEQUANTIZES_FROM:
        raise ValueError(f"count_step: tokens must be at least {DEQUANTIZES_FROM}, got {tokens}")
    for _first_step in (True, False):
        with counting(layer, REPLACED) as step:
            _run(layer, shape, tokens)
    return step


def _run(layer: nn.Module, shape: Shape, tokens: int) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    x = torch.empty(1, tokens, shape.hidden_size, requires_grad=True, **options)
    angles = torch.empty(1, tokens, shape.hidden_size // shape.num_attention_heads, **options)
    y = layer(x, position_embeddings=(angles, angles))
    y.backward(torch.empty_like(y))
    layer.zero_grad(set_to_none=True)


# ---- the layers


def _decoder_layer(shape: Shape) -> nn.Module:
    from transformers import AttentionInterface, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    AttentionInterface.register(_ATTENTION, _flash_attention)
    config = LlamaConfig(**vars(shape), attn_implementation=_ATTENTION)
    with torch.device("meta"):
        layer: nn.Module = LlamaDecoderLayer(config, layer_idx=0)
    return layer.to(torch.bfloat16).requires_grad_(False)


def _flash_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """The kernel that PyTorch takes for causal attention on a GPU; for ``meta`` it would take many."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = attend(query, key, value, 0.0, True, False, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def with_adapters(
    layer: nn.Module, quantized: Callable[[nn.Linear], nn.Module], adapter_dtype: torch.dtype
) -> nn.Module:
    """A ``PeftModel`` over ``layer``, whose linear layers of the names of :data:`LINEARS` were quantized first."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, quantized(module))
    layer.is_loaded_in_4bit = True  # type: ignore[assignment]  # where PEFT looks for what from_pretrained notes down
    adapted: nn.Module = peers.with_adapter(layer, list(LINEARS), adapter_dtype)
    return adapted


def bitsandbytes_linear(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' layer as transformers loads it: quantized by bitsandbytes, which takes ``meta`` tensors too."""
    import bitsandbytes as bnb

    # bitsandbytes keeps this table for the whole process, on the device where it needs it first
    with torch.device("cpu"):
        bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    packed, state = bnb.functional.quantize_4bit(linear.weight.data, blocksize=BLOCK_SIZE, **options)
    result: nn.Module = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **options
    )
    result.weight = bnb.nn.Params4bit(
        packed, quant_state=state, blocksize=BLOCK_SIZE, module=result, bnb_quantized=True, **options
    )
    result.quant_state = state
    return result


def quantized_linear(linear: nn.Linear) -> nn.Module:
    """Our layer in the same format."""
    from peftkern.nn import QuantizedLinear

    return QuantizedLinear.from_linear(linear, "nf4", BLOCK_SIZE, double_quant=True)


# ---- bitsandbytes' operators on a GPU


def _multiply_4bit(
    x: Tensor,
    packed: Tensor,
    shape: torch.Size,
    absmax: Tensor,
    block_size: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """``bitsandbytes::gemm_4bit`` as version 0.50.2 runs it for many tokens on a GPU: the weight is dequantized."""
    if absmax_8bit is not None:
        decode = torch.ops.bitsandbytes.dequantize_blockwise.default
        absmax = decode(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    weight = dequantize(packed, absmax, block_size, quant_type, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


REPLACED: Mapping[str, Callable[..., Any]] = {"bitsandbytes::gemm_4bit": _multiply_4bit}
"""For :func:`peftkern.bench.traffic.counter.counting`."""
