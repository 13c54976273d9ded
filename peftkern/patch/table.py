"""Plain-text tables, and the grouping of rows that differ in nothing but their layer number."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def pattern_of(name: str) -> str:
    """``name`` of a module or parameter with every layer number replaced by ``*``."""
    return _LAYER_NUMBER.sub(".*", name)


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width under a ruled header; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    rule = ["─" * width for width in widths]
    return "\n".join(_format_line(line, widths) for line in (headers, rule, *rows))


def _format_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
