"""From where a sparse product gathers: from x (dY backward) as it is, or from a copy that has its tokens side by side.

An entry of S needs one feature of every token. In x, [tokens, in], those lie a row apart, and a GPU fetches a whole
sector for each; in a copy [in, tokens] they lie side by side. Bytes that pass, with a launch counted as some more:

    as it is   entries · tokens · SECTOR
    copied     2 · tokens · features · size + entries · tokens · size + LAUNCH

The copy pays from about an eighth of an entry for each feature, in 16 bits: at 0.01% of a 4096 x 4096 matrix already,
not for the 16 entries that a matrix has in DSEE, nor where one token is decoded.
"""

from __future__ import annotations

import torch

SECTOR = 32
"""Bytes that a GPU fetches at least."""
LAUNCH = 8 << 20
"""Bytes that could be moved while one more kernel is launched: 4 µs at 2 TB/s."""


def is_copied(entries: int, tokens: int, features: int, dtype: torch.dtype) -> bool:
    """Whether a copy moves fewer bytes.

    Args:
        entries: of S.
        tokens: rows of what is gathered from.
        features: its columns.
        dtype: its dtype.
    """
    copy = 2 * tokens * features * dtype.itemsize + LAUNCH
    return copy + entries * tokens * dtype.itemsize < entries * tokens * SECTOR
