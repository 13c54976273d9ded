"""A sparse delta's own work, forward and backward: ``pytest benchmarks/bench_sparse_linear.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from peftkern.bench import sparse_linear

layer = functools.lru_cache(maxsize=1)(sparse_linear.setup_layer)


@pytest.mark.parametrize("peer", ["dense form", "torch.sparse"])
@pytest.mark.parametrize("density", [0.0001, 0.001, 0.01, 0.05])
def test_sparse_linear(compare: Callable[..., None], density: float, peer: str) -> None:
    compare(sparse_linear.setup_case(layer(density), peer))
