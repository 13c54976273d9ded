"""How long each way to compute a product is estimated to take: the defaults of :mod:`crossover`.

A product is ``y = x Wᵀ`` (forward) or ``dX = dY W`` (backward) of a group of layers, its adapters in the same sum. It
takes one launch after the other, and each launch takes what the slowest of its parts takes:

    launch  = max(bytes / B, FLOPs / F + decoding instructions / I) + OVERHEAD

    few     = product(codes once) [+ partial sums, of the result and forward of h, added up by a launch each]
    fused   = project + product(codes; every weight decoded again for every tile of tokens)
    staged  = decode + project + product(decoded W)
    vendor  = decode + project + adapter(writes the result) + a product of the vendor per layer (reads and writes it)

* *B, F, I* are the device's bandwidth, arithmetic rate and issue rate (:mod:`devices`) times the fractions below. These
  were read off times on one H100 (SXM) and are assumptions everywhere else: ``peftkern tune`` replaces them.
* Decoding and multiplying add up: the multiplications of a tile wait until it is decoded, and registers leave room for
  one or two blocks per multiprocessor, so that hardly another block fills the gap.
* Our products run in the tiles of :mod:`configurations`, in waves of one tile per multiprocessor; a multiprocessor
  without a tile counts as busy. The vendor's library is assumed to cut small products so that all are busy.
* *project* is the kernel in front that multiplies x with the adapters' A; the backward pass has none there. With few
  tokens it waits for memory at every step of its sum, whatever it loads, and so does *fused*.
* *few* decodes slower than the other products: its programs wait for codes more than they compute.
* *decode* writes W in the dtype of the activations. Dense weights have no decode launch, and are never fused.

Not modelled: caches (every launch moves its bytes through memory), and 8-bit codes, which count as 4-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from peftkern.backends.triton.configurations import Tile, few_tokens_kernel, inner_parts, tile_for
from peftkern.backends.triton.devices import Rates
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.paths import FEW_TOKENS, Path

Direction = Literal["forward", "backward"]
Arithmetic = Literal["half", "tf32", "single"]

BANDWIDTH_FRACTION = 0.85
VENDOR_FRACTION = 0.79
"""Of the tensor cores' rate, as the vendor's library reaches it in large products."""
OWN_FRACTION = 0.875
"""Of the vendor's rate, as our product reaches it on tensor cores."""
OWN_FRACTION_SINGLE = 0.5
"""The same without tensor cores: nobody has measured it."""
ISSUE_FRACTION = 0.7
"""Of the issue slots that decoding fills, with eight to sixteen warps per multiprocessor."""
FEW_ISSUE_FRACTION = {"forward": 0.27, "backward": 0.4}
"""The same of few tokens; forward every program reads A as well."""
PROJECT_STEP, FUSED_STEP = 0.28e-6, 0.39e-6
"""Seconds of one step of the sum in *project*, and in a product that decodes: however few tokens there are, no less."""
OVERHEAD = 3e-6
"""Seconds per launch."""

_PACKED = 0.5 + 4 / 64
"""Bytes per weight: 4 bits, and a float32 scale for each 64."""
_WARP = 32


@dataclass(frozen=True)
class Product:
    """One product of a group.

    Attributes:
        direction: ``"forward"`` or ``"backward"``.
        tokens: rows of x.
        out_features: summed over the group.
        in_features: of every member.
        members: layers in the group.
        quantized: whether W has to be decoded, or cast to the dtype of x.
        arithmetic: what multiplies: tensor cores on 16-bit (``"half"``) or TF32 operands, or ``"single"`` precision.
    """

    direction: Direction
    tokens: int
    out_features: int
    in_features: int
    members: int
    quantized: bool
    arithmetic: Arithmetic

    @property
    def weights(self) -> int:
        """Elements of W."""
        return self.out_features * self.in_features

    @property
    def flops(self) -> int:
        """Floating-point operations, the adapters' aside."""
        return 2 * self.tokens * self.weights

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.arithmetic == "half" else 4

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.out_features if self.direction == "forward" else self.in_features

    @property
    def depth(self) -> int:
        """Terms of each sum."""
        return self.weights // self.columns

    @property
    def weight_bytes(self) -> float:
        """As W is stored."""
        return self.weights * (_PACKED if self.quantized else self.element)

    @property
    def result_bytes(self) -> int:
        """Of the result, once."""
        return self.tokens * self.columns * self.element

    @property
    def operand_bytes(self) -> int:
        """Of the activations, once."""
        return self.tokens * self.depth * self.element


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """What multiplies activations of ``dtype``: float32 follows ``torch.get_float32_matmul_precision()``."""
    if dtype != torch.float32:
        return "half"
    return "single" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def possible_paths(product: Product) -> list[Path]:
    """The ways that can compute ``product``, those with fewer launches first."""
    few = [Path.FEW] if product.tokens <= FEW_TOKENS else []
    fused = [Path.FUSED] if product.quantized else []
    return [*few, *fused, Path.STAGED, Path.VENDOR]


def estimate(path: Path, product: Product, rates: Rates) -> float:
    """Seconds that ``path`` is estimated to take, on a device of these rates."""
    return _ESTIMATES[path](product, rates)


def _few(product: Product, rates: Rates) -> float:
    tile = _tile(few_tokens_kernel(product.tokens), product, rates)
    parts = inner_parts(cdiv(product.columns, tile.columns), cdiv(product.depth, tile.inner), tile.num_warps)
    partial = 4 * parts * product.tokens * product.columns if parts > 1 else 0
    written = partial if partial else product.result_bytes
    compute = product.flops / _own_rate(product, rates)
    waiting = ISSUE_FRACTION / FEW_ISSUE_FRACTION[product.direction]
    decode = _decode_seconds(product, rates) * waiting if product.quantized else 0.0
    seconds = _launch(rates, product.weight_bytes + product.operand_bytes + written, compute + decode)
    if not partial:
        return seconds
    sum_of_h = _launch(rates, 0.0) if product.direction == "forward" else 0.0
    return seconds + _launch(rates, partial + product.result_bytes) + sum_of_h


def _fused(product: Product, rates: Rates) -> float:
    tile = _tile("fused", product, rates)
    repeats = cdiv(product.tokens, tile.tokens) * _idle(product, tile, rates)
    compute = _own_seconds(product, tile, rates) + _decode_seconds(product, rates) * repeats
    compute = max(compute, cdiv(product.depth, tile.inner) * FUSED_STEP)
    moved = product.weight_bytes + product.operand_bytes + product.result_bytes
    return _project(product, rates) + _launch(rates, moved, compute)


def _staged(product: Product, rates: Rates) -> float:
    moved = product.weights * product.element + product.operand_bytes + product.result_bytes
    ours = _launch(rates, moved, _own_seconds(product, _tile("dense", product, rates), rates))
    return _decode(product, rates) + _project(product, rates) + ours


def _vendor(product: Product, rates: Rates) -> float:
    if product.direction == "forward":  # every member reads x and has its own result
        moved = product.members * product.operand_bytes + 2 * product.result_bytes
    else:  # every member has its own dY and adds to the one dX
        moved = product.operand_bytes + 2 * product.members * product.result_bytes
    compute = product.flops / (_rate(product, rates) * VENDOR_FRACTION)
    theirs = _launch(rates, product.weights * product.element + moved, compute)
    adapter = _launch(rates, product.result_bytes)
    more_launches = (product.members - 1) * OVERHEAD
    return _decode(product, rates) + _project(product, rates) + adapter + theirs + more_launches


_ESTIMATES: dict[Path, Callable[[Product, Rates], float]] = {
    Path.FEW: _few,
    Path.FUSED: _fused,
    Path.STAGED: _staged,
    Path.VENDOR: _vendor,
}


def _launch(rates: Rates, moved: float, compute: float = 0.0) -> float:
    return max(moved / (rates.bandwidth * BANDWIDTH_FRACTION), compute) + OVERHEAD


def _project(product: Product, rates: Rates) -> float:
    if product.direction == "backward":
        return 0.0
    tile = _tile("project" if product.members < 3 else "project of three", product, rates)
    steps = cdiv(product.depth, tile.inner)
    return _launch(rates, product.operand_bytes, steps * PROJECT_STEP)


def _decode(product: Product, rates: Rates) -> float:
    if not product.quantized:
        return 0.0
    moved = product.weights * (_PACKED + product.element)
    return _launch(rates, moved, _decode_seconds(product, rates))


def _decode_seconds(product: Product, rates: Rates) -> float:
    """Issue time of decoding every weight once."""
    return product.weights * rates.decode / _WARP / (rates.issue * ISSUE_FRACTION)


def _rate(product: Product, rates: Rates) -> float:
    return {"half": rates.half, "tf32": rates.tf32, "single": rates.single}[product.arithmetic]


def _own_rate(product: Product, rates: Rates) -> float:
    own = OWN_FRACTION_SINGLE if product.arithmetic == "single" else OWN_FRACTION
    return _rate(product, rates) * VENDOR_FRACTION * own


def _tile(kernel: str, product: Product, rates: Rates) -> Tile:
    major, minor = rates.capability
    dtype = torch.bfloat16 if product.arithmetic == "half" else torch.float32
    return tile_for(kernel, 10 * major + minor, dtype, product.tokens)


def _own_seconds(product: Product, tile: Tile, rates: Rates) -> float:
    """Arithmetic of our product, in whole tiles and whole waves."""
    rows = cdiv(product.tokens, tile.tokens) * tile.tokens
    columns = cdiv(product.columns, tile.columns) * tile.columns
    padded = 2 * rows * columns * product.depth
    return padded / _own_rate(product, rates) * _idle(product, tile, rates)


def _idle(product: Product, tile: Tile, rates: Rates) -> float:
    """How much longer the waves take than if every multiprocessor were always busy."""
    tiles = cdiv(product.tokens, tile.tokens) * cdiv(product.columns, tile.columns)
    waves = cdiv(tiles, rates.multiprocessors)
    return waves * rates.multiprocessors / tiles
