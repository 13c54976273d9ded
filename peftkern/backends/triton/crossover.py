"""Which way a product is computed, by its shape and the device: the user's measured table, or else estimates.

The estimates are those of :mod:`roofline`. Where several ways lie within :data:`UNCERTAINTY` of the fastest, nobody can
tell from an estimate which is faster, and the one with fewer launches is taken. ``peftkern tune`` measures instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from peftkern.backends.triton import measured
from peftkern.backends.triton.devices import DeviceKey, assumed, device_key, rates_of
from peftkern.backends.triton.paths import FEW_TOKENS, Path
from peftkern.backends.triton.roofline import (
    Direction,
    Product,
    arithmetic_of,
    estimate,
    possible_paths,
)

__all__ = [
    "FEW_TOKENS",
    "UNCERTAINTY",
    "Choice",
    "DeviceKey",
    "Path",
    "Product",
    "assumed",
    "choose",
    "device_key",
    "forced",
    "forget",
    "possible_paths",
]

UNCERTAINTY = 1.15
"""Estimates that differ by less than this factor count as equal: every launch costs the host time as well."""


@dataclass(frozen=True)
class Choice:
    """The path of a product, and why."""

    path: Path
    reason: str


_forced: list[Path] = []


@contextmanager
def forced(path: Path) -> Iterator[None]:
    """Inside, every product that ``path`` can compute takes it; the table decides for the others."""
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def choose(
    direction: Direction,
    tokens: int,
    out_features: int,
    in_features: int,
    members: int,
    quantized: bool,
    dtype: torch.dtype,
    device: DeviceKey,
) -> Choice:
    """The path of one product of a group.

    Args:
        direction: ``"forward"`` for y, ``"backward"`` for dX.
        tokens: rows of x, at least one.
        out_features: summed over the group.
        in_features: of every member.
        members: layers in the group.
        quantized: whether W has to be decoded, or cast, to the dtype of x.
        dtype: of x, float32, bfloat16 or float16; float32 follows ``torch.get_float32_matmul_precision()``.
        device: as :func:`device_key` tells it.
    """
    product = _product(direction, tokens, out_features, in_features, members, quantized, arithmetic_of(dtype))
    if _forced and _forced[-1] in possible_paths(product):
        return Choice(_forced[-1], "forced")
    return _choose(product, device)


_product = lru_cache(maxsize=4096)(Product)


def forget() -> None:
    """Read the user's table again at the next choice."""
    measured.forget()
    _choose.cache_clear()


@lru_cache(maxsize=4096)
def _choose(product: Product, device: DeviceKey) -> Choice:
    row = None if device.assumed else measured.find(product, device)
    return _estimated(product, device) if row is None else _measured(product, row, device)


def _measured(product: Product, row: measured.Row, device: DeviceKey) -> Choice:
    path = row.path(product.tokens)
    if path not in possible_paths(product):
        return _estimated(product, device)
    return Choice(path, f"measured on this GPU at {row.out_features} x {row.in_features}")


def _estimated(product: Product, device: DeviceKey) -> Choice:
    rates = rates_of(device)
    seconds = {path: estimate(path, product, rates) for path in possible_paths(product)}
    limit = min(seconds.values()) * UNCERTAINTY
    path = next(path for path, value in seconds.items() if value <= limit)
    rival = min((other for other in seconds if other != path), key=seconds.__getitem__)
    ours, theirs = seconds[path] * 1e6, seconds[rival] * 1e6
    return Choice(path, f"estimated from the rates of {rates.model}: {ours:.0f} us, {rival} {theirs:.0f} us")
