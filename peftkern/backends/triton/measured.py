"""The user's own table of crossovers, which ``peftkern tune`` measures: one file in the cache folder.

It holds, for one GPU and one set of versions, the path for each range of tokens at the shapes that were measured. A
file that cannot be read, or that was measured elsewhere, counts as none: a warning says how to renew it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path as FilePath
from typing import Any

import torch

from peftkern._version import __version__
from peftkern.backends.triton.devices import DeviceKey
from peftkern.backends.triton.paths import Path
from peftkern.backends.triton.roofline import Arithmetic, Direction, Product
from peftkern.user_cache import cache_folder

logger = logging.getLogger("peftkern")

_LAYOUT = 1
"""Of the file; raise it when its fields change."""

_NEAR = 2.0
"""Shapes that differ by more than this many factors of two, both features together, say nothing of each other."""


@dataclass(frozen=True)
class Band:
    """The path up to and including ``up_to`` tokens; ``None``: for any number."""

    up_to: int | None
    path: Path


@dataclass(frozen=True)
class Row:
    """What was measured for one product: its bands, by rising number of tokens, the last one open."""

    direction: Direction
    out_features: int
    in_features: int
    members: int
    quantized: bool
    arithmetic: Arithmetic
    bands: tuple[Band, ...]

    @property
    def subject(self) -> tuple[Any, ...]:
        """What the row is about: all of it but the bands."""
        sizes = (self.out_features, self.in_features, self.members)
        return (self.direction, *sizes, self.quantized, self.arithmetic)

    def path(self, tokens: int) -> Path:
        """The fastest path that was measured for this number of tokens."""
        return next(band.path for band in self.bands if band.up_to is None or tokens <= band.up_to)

    def distance(self, product: Product) -> float:
        """How many factors of two the shape of ``product`` is away; infinite if its time is no guide at all."""
        ours = (self.direction, self.members, self.quantized, self.arithmetic)
        if ours != (product.direction, product.members, product.quantized, product.arithmetic):
            return math.inf
        sizes = ((self.out_features, product.out_features), (self.in_features, product.in_features))
        return sum(abs(math.log2(mine / other)) for mine, other in sizes)


def table_file() -> FilePath:
    """Where the table is kept. It need not exist."""
    return cache_folder() / "crossover.json"


def find(product: Product, device: DeviceKey) -> Row | None:
    """The row of the nearest shape in the user's table for ``device``, or ``None``."""
    rows = _load(table_file(), device)
    near = min(rows, key=lambda row: row.distance(product), default=None)
    return near if near is not None and near.distance(product) <= _NEAR else None


def save(rows: Sequence[Row], device: DeviceKey) -> FilePath:
    """Write the table of ``device``, all of it or nothing; returns the file.

    Rows of other products stay, if they were measured on this GPU with these versions.

    Raises:
        OSError: the file cannot be written.
    """
    file = table_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in _load(file, device) if row.subject not in {one.subject for one in rows}]
    text = json.dumps({**_stamp(device), "rows": [asdict(row) for row in (*kept, *rows)]}, indent=1)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text + "\n")
        os.replace(temporary, file)
    except BaseException:
        FilePath(temporary).unlink(missing_ok=True)
        raise
    forget()
    return file


def forget() -> None:
    """Read the file again at the next question."""
    _load.cache_clear()


@lru_cache(maxsize=16)
def _load(file: FilePath, device: DeviceKey) -> tuple[Row, ...]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stamp = {name: content[name] for name in _stamp(device)}
        rows = tuple(_row(entry) for entry in content["rows"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError) as error:
        return _ignore(file, f"it cannot be read ({type(error).__name__}: {error})")
    different = [
        f"{name} {stamp[name]!r}, here {here!r}" for name, here in _stamp(device).items() if stamp[name] != here
    ]
    return _ignore(file, f"it was measured with {'; '.join(different)}") if different else rows


def _ignore(file: FilePath, why: str) -> tuple[Row, ...]:
    logger.warning(
        "%s is ignored, because %s; estimates decide instead. `peftkern tune` measures it again on this GPU", file, why
    )
    return ()


def _stamp(device: DeviceKey) -> dict[str, Any]:
    """What a table holds for: it is stale where any of this differs."""
    return {
        "layout": _LAYOUT,
        "device": device.name,
        "capability": list(device.capability),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "peftkern": __version__,
    }


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _row(entry: dict[str, Any]) -> Row:
    bands = tuple(Band(band["up_to"], Path(band["path"])) for band in entry["bands"])
    row = Row(**{**entry, "bands": bands})
    sizes = (row.out_features, row.in_features, row.members)
    limits = [0 if band.up_to is None else band.up_to for band in bands[:-1]]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"sizes must be positive numbers, got {sizes}")
    if not bands or bands[-1].up_to is not None or sorted({0, *limits}) != [0, *limits]:
        raise ValueError(f"bands must rise and end with an open one, got {[band.up_to for band in bands]}")
    return row
