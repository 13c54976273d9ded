"""Folders that are expensive to make, kept in the user's cache: made atomically, checked before each use."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from peftkern.finetune.errors import describe_write_failures
from peftkern.user_cache import ENVIRONMENT_VARIABLE, cache_folder

logger = logging.getLogger("peftkern")

_MANIFEST = "manifest.json"
_CHUNK = 1 << 22


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, made by ``build`` when it is not there or has been damaged.

    Args:
        name: of the folder; it must change whenever what ``build`` writes changes.
        build: fills the empty folder that it is given.

    Raises:
        RunError: the cache cannot be written.
    """
    folder = cache_folder() / name
    if folder.exists():
        damage = _find_damage(folder)
        if damage is None:
            return folder
        logger.warning("the cached folder %s is damaged (%s); it is made again", folder, damage)
    with describe_write_failures(
        "the cache", folder, f"free some space, or set {ENVIRONMENT_VARIABLE} to another folder"
    ):
        _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(temporary)
        _write_manifest(temporary)
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path) -> None:
    if folder.exists() and _find_damage(folder) is not None:
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        # another process was faster; its folder is as good
        if not folder.exists() or _find_damage(folder) is not None:
            raise


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and checksum: enough against truncation and bit rot, and three times faster than a cryptographic hash."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return {"size": path.stat().st_size, "crc32": checksum}


def _find_damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, or ``None``."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if _fingerprint(folder / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None
