"""The folder in the user's cache where everything that is expensive to make again is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENVIRONMENT_VARIABLE = "PEFTKERN_CACHE"


def cache_folder() -> Path:
    """Where the cache lives: ``PEFTKERN_CACHE``, or ``peftkern`` in the user's cache folder. It need not exist."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(chosen).expanduser() if chosen else _user_cache() / "peftkern"


def _user_cache() -> Path:
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and Path(xdg).is_absolute():  # the specification ignores relative paths
        return Path(xdg)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    return Path.home() / ".cache"
