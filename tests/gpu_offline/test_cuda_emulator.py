"""The emulator of CUDA kernels finds the defects that it is there to find, and none in the same kernels without."""

from __future__ import annotations

import re
from dataclasses import dataclass

import cuda_emulation
import pytest
from cuda_emulation import ADDRESSES, MODES, ORDERS, PLAIN, THREADS

pytestmark = pytest.mark.skipif(cuda_emulation.MISSING is not None, reason=str(cuda_emulation.MISSING))

SOURCE = r"planted_bugs\.cpp:\d+"


@dataclass(frozen=True)
class Found:
    """What is said of a defect when it is switched on, and in which orders of the threads, all where none is named."""

    mode: str
    message: str
    orders: tuple[str, ...] = ORDERS


DEFECTS = {
    "missing_barrier": (
        Found(PLAIN, "^wrong$", ("forward", "greedy", "random")),
        Found(THREADS, rf"data race(.|\n)*\bsum \S*{SOURCE}"),
    ),
    "missing_second_barrier": (
        Found(PLAIN, "^wrong$"),
        Found(THREADS, rf"data race(.|\n)*\bturn_twice \S*{SOURCE}"),
    ),
    "plain_add": (Found(THREADS, rf"data race(.|\n)*\bcount \S*{SOURCE}"),),
    "same_place": (Found(THREADS, rf"data race(.|\n)*\bone_each \S*{SOURCE}"),),
    "past_the_end": (Found(ADDRESSES, rf"heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*\bcopy \S*{SOURCE}"),),
    "past_shared_memory": (
        Found(ADDRESSES, rf"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*\bcopy_in_shared_memory \S*{SOURCE}"),
    ),
    "misaligned": (Found(ADDRESSES, "misaligned address .* requires 16 byte alignment"),),
    "barrier_of_some": (Found(PLAIN, rf"barrier at \S*{SOURCE}: reached by 40 of 64 threads"),),
    "two_barriers": (Found(PLAIN, rf"two barriers at once: some threads wait at \S*{SOURCE}"),),
    "absent_lanes": (Found(PLAIN, r"warp operation.*(never reach it|a lane of its mask has returned)"),),
    "lanes_at_a_barrier": (Found(PLAIN, "warp operation.*lanes of its mask never reach it"),),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(name: str) -> None:
    for found in DEFECTS[name]:
        program = cuda_emulation.planted_bugs(found.mode)
        for order in found.orders:
            result = cuda_emulation.run(program, name, 1, order=order, workers=2)
            assert re.search(found.message, result.stdout + result.stderr, re.MULTILINE), (order, result)


def test_no_single_order_finds_every_missing_barrier() -> None:
    program = cuda_emulation.planted_bugs(PLAIN)
    assert cuda_emulation.run(program, "missing_barrier", 1, order="reverse").stdout == "right\n"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_found_without_the_defect(mode: str) -> None:
    program = cuda_emulation.planted_bugs(mode)
    for name in DEFECTS:
        for order, workers in zip(ORDERS, (1, 2, 4, 1, 3), strict=True):
            result = cuda_emulation.run(program, name, 0, order=order, workers=workers)
            assert (result.stdout, result.stderr, result.returncode) == ("right\n", "", 0), (name, order)


def test_races_between_blocks_are_found_though_one_worker_runs_them() -> None:
    result = cuda_emulation.run(cuda_emulation.planted_bugs(THREADS), "same_place", 1, workers=1)
    assert "data race" in result.stderr
