"""The files of a sparse update: ``sparse_update.json``, and the safetensors file that it names.

Positions are kept as the gaps between them, in the smallest unsigned integers that hold these: for one entry in a
hundred, one byte each. The safetensors file is named after its SHA-256 hash, and the JSON file is written last, so that
a reader finds one whole update or the one from before.

Of an update that is read, everything is checked before anything is returned: the hash, the tensors that are there,
their dtypes and lengths, that positions ascend within their tensor, and that values are finite.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from peftkern.ops.lora_linear import FLOAT_DTYPES

CONFIG = "sparse_update.json"
FORMAT, VERSION = "peftkern sparse update", 1

_FILE = re.compile(r"sparse_update-[0-9a-f]{16}\.safetensors")
_GAPS = (torch.uint8, torch.uint16, torch.uint32, torch.int64)
_MOST_ELEMENTS = 2**62
_WORDS = {"method": str, "metadata": dict, "base": dict, "entries": dict, "dense": list, "sha256": str, "file": str}


@dataclass(frozen=True, eq=False)
class Entries:
    """Numbers at some places of a tensor.

    Attributes:
        shape: of the tensor.
        flat: [entries] int64, positions in the tensor flattened row by row, strictly ascending.
        values: [entries], floating-point.
    """

    shape: torch.Size
    flat: Tensor
    values: Tensor

    def check(self) -> None:
        """Raise `ValueError` where the three do not fit each other or a value is not finite."""
        size = math.prod(self.shape)
        if self.flat.dim() != 1 or self.flat.dtype != torch.int64 or self.values.shape != self.flat.shape:
            got = f"{list(self.flat.shape)} {self.flat.dtype} and {list(self.values.shape)}"
            raise ValueError(f"positions must be [entries] int64, and values [entries]; got {got}")
        if self.values.dtype not in FLOAT_DTYPES:
            raise ValueError(f"values must be floating-point, got {self.values.dtype}")
        if bool((self.flat.diff() <= 0).any()):
            raise ValueError("positions do not ascend")
        if len(self.flat) and not 0 <= int(self.flat.min()) <= int(self.flat.max()) < size:
            raise ValueError(f"positions reach beyond the {size} elements of the tensor")
        if not bool(self.values.isfinite().all()):
            raise ValueError("values are not finite")


# ---- writing


def save(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entries], dense: Mapping[str, Tensor]) -> None:
    """Write an update; what was in ``folder`` before stays whole until this one is.

    Raises:
        OSError: the folder cannot be written.
        TypeError: ``config`` holds something that JSON does not take.
        ValueError: ``entries`` are inconsistent, or ``config`` holds a number that is not finite.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, one in entries.items():
        one.check()
        tensors[f"{name}:gaps"] = _gaps(one.flat)
        tensors[f"{name}:values"] = one.values.detach().cpu().contiguous()
        first = int(one.flat[0]) if len(one.flat) else 0
        described[name] = {"shape": list(one.shape), "entries": len(one.flat), "first": first}
    tensors |= {f"{name}:dense": tensor.detach().cpu().contiguous() for name, tensor in dense.items()}
    data = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    file = f"sparse_update-{digest[:16]}.safetensors"
    whole = {"format": FORMAT, "version": VERSION, "file": file, "sha256": digest, **config}
    whole |= {"entries": described, "dense": list(dense)}
    text = json.dumps(whole, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / file, data)
    _write_whole(folder / CONFIG, text.encode())
    for other in folder.iterdir():
        if _FILE.fullmatch(other.name) and other.name != file:
            other.unlink()


def _gaps(flat: Tensor) -> Tensor:
    gaps = flat.diff().cpu()
    largest = int(gaps.max()) if len(gaps) else 0
    dtype = next(dtype for dtype in _GAPS if largest <= torch.iinfo(dtype).max)
    return gaps.to(dtype)


def _write_whole(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ---- reading


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Entries], dict[str, Tensor]]:
    """What `save` has written: the config, the entries and the dense tensors.

    Raises:
        FileNotFoundError: there is no update in ``folder``.
        ValueError: it is torn, was changed, is of a newer version, or is not consistent.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"SparseUpdate.load: {folder} holds no {CONFIG}")
    try:
        config = _read_config(path)
        tensors = _read_tensors(folder / config["file"], config["sha256"])
        entries = {name: _read_entries(name, one, tensors) for name, one in config["entries"].items()}
        dense = {name: _take(tensors, f"{name}:dense") for name in config["dense"]}
        if tensors:
            raise ValueError(f"the file holds {next(iter(tensors))!r}, which {CONFIG} does not name")
        for name, tensor in dense.items():
            if tensor.dtype not in FLOAT_DTYPES or not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} must be finite floating-point numbers")
    except ValueError as error:
        raise ValueError(f"SparseUpdate.load: {folder}: {error}") from None
    return config, entries, dense


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is no JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{CONFIG} is not of a {FORMAT}")
    if config.get("version") != VERSION:
        raise ValueError(f"version {config.get('version')!r}; this peftkern reads {VERSION}")
    for key, kind in _WORDS.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{CONFIG}: {key} must be a {kind.__name__}, got {config.get(key)!r:.60}")
    scaling = config.get("scaling")
    if not isinstance(scaling, float) or not math.isfinite(scaling):
        raise ValueError(f"{CONFIG}: scaling must be a finite number, got {scaling!r:.60}")
    if not _FILE.fullmatch(config["file"]):
        raise ValueError(f"{CONFIG}: file must be sparse_update-<hash>.safetensors, got {config['file']!r:.60}")
    if not all(isinstance(name, str) for name in config["dense"]):
        raise ValueError(f"{CONFIG}: dense must be names")
    return config


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path.name} is torn or was changed: its SHA-256 hash is not the one in {CONFIG}")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path.name} is no safetensors file of numbers ({error})") from None


def _take(tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the file has no {key!r}")
    return tensors.pop(key)


def _read_entries(name: str, described: Any, tensors: dict[str, Tensor]) -> Entries:
    shape, count, first = _read_description(name, described)
    gaps, values = _take(tensors, f"{name}:gaps"), _take(tensors, f"{name}:values")
    if gaps.dtype not in _GAPS or tuple(gaps.shape) != (max(count - 1, 0),) or tuple(values.shape) != (count,):
        got = f"{list(gaps.shape)} {gaps.dtype} gaps and {list(values.shape)} values"
        raise ValueError(f"{name} has {count} entries, but the file {got}")
    flat = torch.full((count,), first, dtype=torch.int64)
    flat[1:] += gaps.to(torch.int64).cumsum(0)
    entries = Entries(shape, flat, values)
    try:
        entries.check()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return entries


def _read_description(name: str, described: Any) -> tuple[torch.Size, int, int]:
    try:
        shape, count, first = list(described["shape"]), described["entries"], described["first"]
        fits = all(type(number) is int and 0 <= number < _MOST_ELEMENTS for number in (*shape, count, first))
    except (KeyError, TypeError):
        fits = False
    if not fits or not shape or math.prod(shape) >= _MOST_ELEMENTS:
        raise ValueError(f"{name} must have a shape, and numbers of entries and first; got {described!r:.100}")
    return torch.Size(shape), count, first
