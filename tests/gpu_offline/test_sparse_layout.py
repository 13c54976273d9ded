"""When a sparse product copies what it gathers from, by hand-counted bytes."""

from __future__ import annotations

import pytest
import torch

from peftkern.backends.triton.sparse_layout import LAUNCH, is_copied

MATRIX = 4096 * 4096
HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("entries", "tokens", "dtype", "copied"),
    [
        (16, 2048, HALF, False),  # 1.0 MB, and a copy alone takes 33.6
        (MATRIX // 10_000, 2048, HALF, True),  # 0.01%: 109.9 MB, with a copy 33.6 + 6.9 + 8.4
        (MATRIX // 100, 1, HALF, False),  # one token: 5.4 MB, less than the launch
        (MATRIX // 100, 2, HALF, True),  # 10.7 MB against 0.03 + 0.7 + 8.4
        (MATRIX // 10_000, 2048, SINGLE, True),  # 109.9 MB against 67.1 + 13.7 + 8.4
        (MATRIX // 20_000, 2048, SINGLE, False),  # 54.9 MB against 67.1 + 6.9 + 8.4
    ],
)
def test_the_cheaper_one_is_taken(entries: int, tokens: int, dtype: torch.dtype, copied: bool) -> None:
    assert is_copied(entries, tokens, 4096, dtype) is copied


def test_the_copy_begins_at_the_token_from_which_it_pays() -> None:
    # for each entry and token 32 - 2 bytes less pass; the copy reads and writes 2 bytes for each feature and token
    entries, features = 16 * 8, 15 * 8
    tokens = LAUNCH // (30 * entries - 4 * features) + 1
    spared, spent = 30 * entries * tokens, 4 * features * tokens + LAUNCH
    assert 0 < spared - spent < 30 * entries
    assert is_copied(entries, tokens, features, HALF)
    assert not is_copied(entries, tokens - 1, features, HALF)
