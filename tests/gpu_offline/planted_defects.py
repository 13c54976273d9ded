"""Kernels with one defect each, and one without; ``test_executors.py`` runs this file under ttsem, which must tell."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SIZE, BLOCK = 100, 32
PROGRAMS = (triton.cdiv(SIZE, BLOCK),)


@triton.jit
def add_one(
    x: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    MASK_LOAD: tl.constexpr,
    MASK_STORE: tl.constexpr,
) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + index, mask=index < size) if MASK_LOAD else tl.load(x + index)
    if MASK_STORE:
        tl.store(out + index, values + 1, mask=index < size)
    else:
        tl.store(out + index, values + 1)


@triton.jit
def sum_up(x: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, tl.load(out) + tl.sum(tl.load(x + index)))


def run_add_one(x: torch.Tensor, mask_load: bool = True, mask_store: bool = True) -> torch.Tensor:
    out = torch.empty(SIZE, device="cuda")
    add_one[PROGRAMS](x, out, SIZE, BLOCK, mask_load, mask_store)
    return out


def test_none() -> None:
    x = torch.randn(SIZE, device="cuda")
    assert torch.equal(run_add_one(x), x + 1)


def test_read_past_the_end() -> None:
    run_add_one(torch.randn(SIZE, device="cuda"), mask_load=False)


def test_store_without_mask() -> None:
    # Memory for the elements past the end of x: only the store is wrong.
    run_add_one(torch.randn(2 * SIZE, device="cuda"), mask_load=False, mask_store=False)


def test_race_between_programs() -> None:
    x, out = torch.ones(4 * BLOCK, device="cuda"), torch.zeros(1, device="cuda")
    sum_up[(4,)](x, out, BLOCK)
    assert out.item() == 4 * BLOCK  # the value is right, as the programs ran one after the other


def test_read_of_memory_nobody_wrote() -> None:
    x = torch.empty(SIZE, device="cuda")
    assert run_add_one(x).isfinite().all()
