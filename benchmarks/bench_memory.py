"""Peak resident memory of training SmolLM2-135M: ``pytest benchmarks/bench_memory.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peftkern.bench import memory, smollm2


@pytest.mark.parametrize("setting", memory.SETTINGS)
def test_memory(record: Callable[..., None], setting: str) -> None:
    with smollm2.checkpoint() as checkpoint:
        record(lambda: memory.measure_memory(checkpoint, setting))
