"""What `make gpu-check` times, on the device and small: every item runs, is right, and repeats its launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from peftkern.backends.triton.crossover import Path
from peftkern.gpu_check.items import Bench, Conversion, Gate, GatedBackward, Item, Kernels, Operation
from peftkern.gpu_check.training_items import Importance, MaskedProduct, Selection, SparseProduct, Update
from peftkern.tune.operands import Subject
from peftkern.tune.shapes import Group


class OneCallEach:
    """Calls everything once; each call takes a millisecond."""

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        return 1e-3

    def copies(self, _bytes_touched: int) -> int:
        return 2


SUBJECT = Subject(Group((48, 32), 64), "nf4", torch.float32, rank=16)


def operation(direction: Any, path: Path | None) -> Operation:
    return Operation(SUBJECT, 20, direction, path)


ITEMS: list[Item] = [
    *(operation(direction, path) for direction in ("forward", "backward") for path in (None, *Path)),
    Gate(3, 50, torch.float32, "forward"),
    Gate(3, 50, torch.float32, "backward"),
    GatedBackward(replace(SUBJECT, group=Group((48,), 64)), 20),
    Conversion("quantize", "nf4", (16, 64), torch.bfloat16, "triton", True),
    Conversion("dequantize", "nf4", (16, 64), torch.bfloat16, "triton", True),
    *(
        kind((48, 64), 0.1, 20, torch.float32, way)
        for kind in (SparseProduct, MaskedProduct)
        for way in ("forward", "backward")
    ),
    *(Update((5, 250), bits, torch.bfloat16, kept) for bits in (32, 8) for kept in (None, 0.2)),
    *(Update((5, 250), bits, torch.bfloat16, probe=True) for bits in (32, 8)),
    Selection((30, 10), 0.05, torch.bfloat16),
    Selection((30, 10), 0.05, torch.float32, excluded=0.2),
    *(Importance((30, 40), over, torch.bfloat16) for over in ("entries", "rows", "all", "probe")),
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.title)
def test_an_item_is_right(item: Item) -> None:
    (row,) = item.rows(Bench(OneCallEach(), "cuda", []))
    assert row.error is not None
    assert row.right, row


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_launch_can_be_repeated_by_itself(direction: Any) -> None:
    kernels = Kernels(operation(direction, Path.STAGED))
    rows = list(kernels.rows(Bench(OneCallEach(), "cuda", [])))
    assert [row.kernel for row in rows] == [launched.kernel for launched in kernels.launches()]
