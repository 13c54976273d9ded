"""bitsandbytes' state-dict keys for quantized linear weights, read and written without bitsandbytes.

Beside a packed ``weight`` a checkpoint holds its *companions*. For the blockwise formats:

    weight.absmax             scales, flat: float32 [blocks], or uint8 [blocks] when they are quantized themselves
    weight.quant_map          the format's codebook, float32
    weight.nested_absmax      scales of the scales, float32 [ceil(blocks / 256)]      (only with double quantization)
    weight.nested_quant_map   codebook of the scales, float32 [256]                   (only with double quantization)
    weight.quant_state.bitsandbytes__nf4   JSON in a uint8 tensor: format, block size, dtype, shape, offset of scales

and for row-wise int8: ``SCB`` (absmax per row, float32 [out]) and ``weight_format`` (0: rows). bitsandbytes has no key
for 8-bit blockwise linear weights, so that one's state is called ``weight.quant_state.peftkern__int8_blockwise``.

Source: bitsandbytes 0.50, ``functional.QuantState.as_dict`` and ``nn.Linear8bitLt`` (names and layout of the keys).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.codebooks import codebook
from peftkern.formats.quantized_tensor import (
    BLOCK_SIZES,
    DoubleQuantization,
    QuantizedTensor,
    block_count,
    packed_shape,
    scales_shape,
)

STATE_KEYS = {
    "nf4": "weight.quant_state.bitsandbytes__nf4",
    "fp4": "weight.quant_state.bitsandbytes__fp4",
    "int8_blockwise": "weight.quant_state.peftkern__int8_blockwise",
}
COMPANION_KEYS = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *STATE_KEYS.values(),
    "SCB",
    "weight_format",
)
"""Every key that may stand beside ``weight``, relative to its module."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_STATE_BYTES = 65536
CODEBOOK_TOLERANCE = 1e-6  # codebooks that another version computed may differ in the last bit


@dataclass(frozen=True)
class QuantState:
    """What the JSON companion says: format, block size, dtype and shape of the dense weight, and the nested part."""

    format: str
    block_size: int
    dtype: torch.dtype
    shape: torch.Size
    nested_block_size: int | None = None
    nested_offset: float | None = None


# ---- writing


def write_companions(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors to save beside ``quantized.packed``, by key relative to the module.

    Each value owns its memory or is one of the weight's scales; no two share any, so safetensors takes them.
    """
    device = quantized.scales.device
    if quantized.format == "int8":
        return {"SCB": quantized.scales, "weight_format": torch.zeros((), dtype=torch.uint8, device=device)}
    companions = {
        "weight.absmax": quantized.scales.flatten(),
        "weight.quant_map": codebook(quantized.format, device).clone(),
    }
    state: dict[str, Any] = {
        "quant_type": quantized.format,
        "blocksize": quantized.block_size,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    nested = quantized.double_quantization
    if nested is not None:
        companions["weight.nested_absmax"] = nested.absmax
        companions["weight.nested_quant_map"] = codebook("int8_blockwise", device).clone()
        state["nested_blocksize"] = nested.block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = nested.offset.item()
    companions[STATE_KEYS[quantized.format]] = _pack_json(state)
    return companions


def _pack_json(value: Mapping[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


# ---- reading


def read_weight(weight: Tensor, companions: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> QuantizedTensor:
    """Assemble a quantized weight from checkpoint tensors, whose memory it shares.

    Args:
        weight: packed codes in bitsandbytes' shape or ours: 4-bit [ceil(numel / 2), 1] or [out, in / 2], in uint8 or in
            the bytes of another storage dtype; 8-bit [out, in].
        companions: the tensors beside it, by key relative to the module.
        key: full name of the weight in the checkpoint, for error messages.
        dtype: of the dense weight where the checkpoint does not say (row-wise int8).

    Raises:
        ValueError: a companion is missing, corrupt or does not fit the others; the message begins with its key.
    """
    if "SCB" in companions:
        quantized = _read_rowwise(weight, companions, key, dtype)
    else:
        quantized = _read_blockwise(weight, companions, key)
    try:
        quantized.validate()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return quantized


def _full_key(key: str, companion: str) -> str:
    return key.removesuffix("weight") + companion


def _read_rowwise(weight: Tensor, companions: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> QuantizedTensor:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"{key}: must be int8 [out, in] beside SCB, got {weight.dtype} {list(weight.shape)}")
    scales, layout = companions["SCB"], companions.get("weight_format")
    if scales.numel() != weight.shape[0]:
        raise ValueError(f"{_full_key(key, 'SCB')}: must hold {weight.shape[0]} scales, got {scales.numel()}")
    if layout is not None and (layout.numel() != 1 or layout.item() != 0):
        raise ValueError(f"{_full_key(key, 'weight_format')}: must be 0 (rows); other layouts hold reordered codes")
    scales = _check_scales(scales, _full_key(key, "SCB")).flatten()
    return QuantizedTensor(weight, scales, "int8", weight.shape, dtype, weight.shape[1])


def _read_blockwise(weight: Tensor, companions: Mapping[str, Tensor], key: str) -> QuantizedTensor:
    state = _find_state(companions, key)
    packed = _read_packed(weight, state, key)
    _check_codebook(_require(companions, "weight.quant_map", key), codebook(state.format), f"{key}.quant_map")
    scales = _require(companions, "weight.absmax", key)
    blocks = block_count(state.shape.numel(), state.block_size)
    if scales.numel() != blocks:
        raise ValueError(
            f"{key}.absmax: {list(state.shape)} in blocks of {state.block_size} takes {blocks} scales, "
            f"got {scales.numel()}"
        )
    nested = _read_nested(scales, companions, state, key)
    if nested is None:
        _check_scales(scales, f"{key}.absmax")
    scales = scales.reshape(scales_shape(state.shape, state.format, state.block_size))
    return QuantizedTensor(packed, scales, state.format, state.shape, state.dtype, state.block_size, nested)


def _read_packed(weight: Tensor, state: QuantState, key: str) -> Tensor:
    # bitsandbytes can keep the codes in a floating-point tensor, whose bytes are the codes.
    packed = weight.flatten().view(torch.uint8)
    shape = packed_shape(state.shape, state.format, state.block_size)
    if packed.numel() != shape.numel():
        raise ValueError(
            f"{key}: {list(state.shape)} in {state.format} takes {shape.numel()} bytes, but the packed tensor has "
            f"{packed.numel()}; the checkpoint is truncated or states another shape"
        )
    return packed.reshape(shape)


def _require(companions: Mapping[str, Tensor], name: str, key: str) -> Tensor:
    if name not in companions:
        raise ValueError(f"{_full_key(key, name)}: missing, although {key} is quantized")
    return companions[name]


def _check_scales(scales: Tensor, key: str) -> Tensor:
    if scales.dtype != torch.float32:
        raise ValueError(f"{key}: must be float32, got {scales.dtype}")
    if not scales.is_meta and not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{key}: holds NaN or infinite scales")
    return scales


def _check_codebook(found: Tensor, expected: Tensor, key: str) -> None:
    if found.numel() != expected.numel() or not found.is_floating_point():
        raise ValueError(f"{key}: must hold {expected.numel()} floats, got {found.dtype} {list(found.shape)}")
    difference = (found.flatten().float() - expected.to(found.device)).abs().max().item()
    if not difference <= CODEBOOK_TOLERANCE:
        raise ValueError(f"{key}: is not the codebook of the format (off by {difference:.3g}); others cannot be read")


def _read_nested(
    scales: Tensor, companions: Mapping[str, Tensor], state: QuantState, key: str
) -> DoubleQuantization | None:
    if state.nested_offset is None or state.nested_block_size is None:
        if scales.dtype == torch.uint8:
            raise ValueError(f"{key}.absmax: is quantized (uint8), but the quant_state has no nested_offset")
        return None
    if scales.dtype != torch.uint8:
        raise ValueError(f"{key}.absmax: must be uint8 with double quantization, got {scales.dtype}")
    absmax = _check_scales(_require(companions, "weight.nested_absmax", key), f"{key}.nested_absmax").flatten()
    expected = block_count(scales.numel(), state.nested_block_size)
    if absmax.numel() != expected:
        raise ValueError(f"{key}.nested_absmax: must hold {expected} values, got {absmax.numel()}")
    nested_map = _require(companions, "weight.nested_quant_map", key)
    _check_codebook(nested_map, codebook("int8_blockwise"), f"{key}.nested_quant_map")
    offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device)
    return DoubleQuantization(absmax, offset, state.nested_block_size)


def _find_state(companions: Mapping[str, Tensor], key: str) -> QuantState:
    found = [name for name in STATE_KEYS.values() if name in companions]
    if len(found) != 1:
        wanted = ", ".join(STATE_KEYS.values())
        raise ValueError(f"{key}: is packed, so exactly one of {wanted} must stand beside it; got {found or 'none'}")
    state = parse_quant_state(companions[found[0]], _full_key(key, found[0]))
    if STATE_KEYS[state.format] != found[0]:
        raise ValueError(f"{_full_key(key, found[0])}: its JSON says quant_type {state.format!r}")
    return state


def parse_quant_state(packed: Tensor, key: str) -> QuantState:
    """Read the JSON companion.

    Args:
        packed: uint8 [bytes], UTF-8 JSON.
        key: its name in the checkpoint, for error messages.

    Raises:
        ValueError: anything but a complete, sensible state; the message begins with ``key``.
    """
    if packed.dtype != torch.uint8 or packed.is_meta or packed.numel() > MAX_STATE_BYTES:
        raise ValueError(
            f"{key}: must be JSON in a uint8 tensor of at most {MAX_STATE_BYTES} bytes, got {packed.dtype} "
            f"{list(packed.shape)} on {packed.device}"
        )
    try:
        fields = json.loads(bytes(packed.flatten().tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{key}: must be a JSON object, got {type(fields).__name__}")
    nested = "nested_offset" in fields or "nested_blocksize" in fields
    return QuantState(
        format=_parse_choice(fields, "quant_type", STATE_KEYS, key),
        block_size=_parse_block_size(fields, "blocksize", key),
        dtype=DTYPES[_parse_choice(fields, "dtype", DTYPES, key)],
        shape=_parse_shape(fields, key),
        nested_block_size=_parse_block_size(fields, "nested_blocksize", key) if nested else None,
        nested_offset=_parse_offset(fields, key) if nested else None,
    )


def _show(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def _parse_choice(fields: Mapping[str, Any], name: str, choices: Collection[str], key: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}: {name} must be one of {', '.join(choices)}; got {_show(value)}")
    return value


def _parse_block_size(fields: Mapping[str, Any], name: str, key: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value not in BLOCK_SIZES:
        raise ValueError(f"{key}: {name} must be one of {sorted(BLOCK_SIZES)}, got {_show(value)}")
    return value


def _parse_shape(fields: Mapping[str, Any], key: str) -> torch.Size:
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"{key}: shape must be [out, in]")
    return torch.Size(shape)


def _parse_offset(fields: Mapping[str, Any], key: str) -> float:
    value = fields.get("nested_offset")
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not abs(value) <= torch.finfo(torch.float32).max
    ):
        raise ValueError(f"{key}: nested_offset must be a finite float32 number, got {_show(value)}")
    return float(value)
