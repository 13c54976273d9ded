"""NF4 quantize and dequantize of a 4096x4096 weight, against bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern import ops
from peftkern.bench import peers
from peftkern.bench.case import Case, Effort

SIZE = 4096
BLOCK_SIZE = 64


def _weight(rows: int, columns: int) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def setup_quantize(double_quant: bool, rows: int = SIZE, columns: int = SIZE) -> Case:
    """Quantize a float32 weight, with the scales quantized as well or not."""
    import bitsandbytes.functional as bnb

    weight = _weight(rows, columns)

    def ours() -> Any:
        return ops.quantize(weight, "nf4", BLOCK_SIZE, double_quant)

    def peer() -> Any:
        return bnb.quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type="nf4")

    def check() -> None:
        quantized = ours()
        packed, state = peer()
        peers.check_equal_bytes("packed", quantized.packed, packed)
        peers.check_equal_bytes("scales", quantized.scales, state.absmax)

    text = "quantize, double" if double_quant else "quantize, single"
    return Case(text, ours, peer, check, effort=Effort(seconds=4.0))


def setup_dequantize(dtype: torch.dtype, rows: int = SIZE, columns: int = SIZE) -> Case:
    """Decode a weight that was quantized from ``dtype`` to ``dtype``, into fresh memory on both sides."""
    import bitsandbytes.functional as bnb

    weight = _weight(rows, columns).to(dtype)
    quantized = ops.quantize(weight, "nf4", BLOCK_SIZE)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")

    def ours() -> Tensor:
        return ops.dequantize(quantized)

    def peer() -> Tensor:
        dense: Tensor = bnb.dequantize_4bit(packed, state)
        return dense

    def check() -> None:
        peers.check_equal_bytes("dequantized weight", ours(), peer())

    name = str(dtype).removeprefix("torch.")
    return Case(f"dequantize to {name}", ours, peer, check, effort=Effort(seconds=4.0))


def cases() -> Iterator[Case]:
    """Cases of ``quantize``."""
    for double_quant in (False, True):
        yield setup_quantize(double_quant)
    for dtype in (torch.float32, torch.bfloat16):
        yield setup_dequantize(dtype)
