"""One NF4 LoRA linear, forward and backward: ``pytest benchmarks/bench_linear.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from peftkern.bench import linear

CASES = [
    *(("highest", linear.HIGHEST, tokens) for tokens in linear.HIGHEST_TOKENS),
    *(("high", linear.HIGH, tokens) for tokens in linear.HIGH_TOKENS),
    *(("bf16", linear.BF16, tokens) for tokens in linear.BF16_TOKENS),
    *(("bf16-float32-adapter", linear.BF16_DEFAULT, tokens) for tokens in linear.BF16_TOKENS),
]

layers = functools.lru_cache(maxsize=1)(linear.setup_layers)


@pytest.mark.parametrize(("precision", "tokens"), [pytest.param(p, t, id=f"{name}-{t}") for name, p, t in CASES])
def test_linear_nf4(compare: Callable[..., None], precision: linear.Precision, tokens: int) -> None:
    compare(linear.setup_case(layers(precision), tokens))
