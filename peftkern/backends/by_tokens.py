"""What runs a product, by its number of tokens: the only thing that differs from call to call of one layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from peftkern.backends import registry

_TOKENS = tuple(1 << power for power in range(1, 14))


def describe(operation: str, arguments: Callable[[int], tuple[Any, ...]], backend: str | None = None) -> str:
    """Backends and their forms, for example ``"cuda to 16 tokens, triton (few) to 64, triton (staged)"``.

    Limits are rounded down to powers of two. ``nothing`` stands where a forced backend takes no call.

    Args:
        operation: a registered name.
        arguments: the operation's for a number of tokens.
        backend: as for :func:`registry.choose`.

    Raises:
        BackendError: no backend, or not the forced one, takes a single token.
    """
    one = registry.describe(operation, *arguments(1), backend=backend)
    texts = [(1, one), *((tokens, _describe(operation, arguments(tokens), backend)) for tokens in _TOKENS)]
    runs = [(list(run)[-1][0], text) for text, run in groupby(texts, key=lambda pair: pair[1])]
    first, *rest = [f"{text} to {limit}" for limit, text in runs[:-1]] or [""]
    words = [f"{first} tokens", *rest] if first else []
    return ", ".join([*words, runs[-1][1]])


def _describe(operation: str, arguments: tuple[Any, ...], backend: str | None) -> str:
    try:
        return registry.describe(operation, *arguments, backend=backend)
    except registry.BackendError:
        return "nothing"
