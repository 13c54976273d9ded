"""The worst relative error of executed Triton kernels against float64, by dtype: what ``gpu-numerics`` reports.

    python -m ttsem.sanitize tests/gpu_offline/executed_errors.py -- FILE
    python tests/gpu_offline/executed_errors.py FILE                              on a GPU

The sample is every path of both directions, for NF4 and dense weights, and the gates of a feed-forward block.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import executor

from peftkern.backends.triton.crossover import possible_paths
from peftkern.gpu_check.items import Bench, Gate, Item, Norm, Operation, Rotation
from peftkern.gpu_check.references import LIMITS
from peftkern.tune.measure import DIRECTIONS, product
from peftkern.tune.operands import Subject
from peftkern.tune.shapes import Group

GROUP, TOKENS = Group((130, 66), 192), 37
"""Several programs along each axis, the last ones in part."""


class OneCallEach:
    """In place of a timer: nothing is timed."""

    def seconds(self, _calls: Sequence[Callable[[], object]]) -> float:
        return 1.0

    def copies(self, _bytes_touched: int) -> int:
        return 1


def sample(dtype: torch.dtype) -> Iterator[Item]:
    for direction in DIRECTIONS:
        yield Gate(TOKENS, 130, dtype, direction)
        yield Norm(TOKENS, 130, dtype, direction)
        for format in ("nf4", None):
            subject = Subject(GROUP, format, dtype)
            for path in possible_paths(product(subject, direction, TOKENS)):
                yield Operation(subject, TOKENS, direction, path)
    yield Rotation(TOKENS, 256, dtype, "forward")


def main() -> None:
    if executor.current() != executor.GPU:
        executor.stand_in_for_cuda()
    bench = Bench(OneCallEach(), "cuda", [])
    errors = {
        str(dtype).removeprefix("torch."): [row.error for item in sample(dtype) for row in item.rows(bench)]
        for dtype in LIMITS
    }
    Path(sys.argv[-1]).write_text(json.dumps({"executor": executor.current(), "errors": errors}))


if __name__ == "__main__":
    main()
