"""Versions of installed packages."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from peftkern import __version__


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of this package and of ``packages``; ``None`` for those that are not installed."""
    return {"peftkern": __version__, **{package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
