"""Offsets past 2^31 elements: no kernel multiplies a stride or a size in 32 bits. Read off the kernels' first IR."""

from __future__ import annotations

import re

import aot_defects
import pytest
import triton
from triton.backends.compiler import GPUTarget

from peftkern.backends.triton.specializations import (
    ENTRIES,
    ENTRY_VARIANTS,
    EVERY_TILE,
    TENSORS,
    VARIANTS,
    Recorded,
    Specialization,
    specializations,
)

_PRODUCT = re.compile(r"arith\.muli (%[\w.]+), (%[\w.]+)(?: \{.*\})? : (?:tensor<[\dx]*)?i32\b")
_SAME = re.compile(r"(%[\w.]+) = tt\.(?:splat|broadcast|expand_dims|reshape) (%[\w.]+)")
_ARGUMENT = re.compile(r"(%[\w.]+): (?:i32|i64|!tt)")
PARTS = {"%token_part", "%part_columns", "%output_parts"}
"""Arguments that count positions along one dimension: with the number of a part they make such a position."""


def narrow_products(specialization: Specialization) -> list[tuple[str, str]]:
    """The 32-bit multiplications in which an argument of the kernel takes part."""
    target = GPUTarget("cuda", 90, 32)
    ir = triton.compile(specialization.source(), target=target, options=specialization.options).asm["ttir"]
    header = next(line for line in ir.split("\n") if "tt.func public" in line)
    arguments = set(_ARGUMENT.findall(header)) - PARTS
    assert arguments
    for result, operand in _SAME.findall(ir):  # in order: an operand stands before what is made of it
        if operand in arguments:
            arguments.add(result)
    return [pair for pair in _PRODUCT.findall(ir) if not arguments.isdisjoint(pair)]


@pytest.mark.parametrize("case", [*EVERY_TILE, *VARIANTS], ids=lambda case: case.name)
def test_products(case: Recorded) -> None:
    for one in specializations(90, [case], []):
        assert narrow_products(one) == [], one.name


@pytest.mark.parametrize("case", [*TENSORS, *ENTRIES, *ENTRY_VARIANTS], ids=lambda case: case.name)
def test_entry_by_entry(case: Recorded) -> None:
    for one in specializations(90, [], [case]):
        assert narrow_products(one) == [], one.name


def test_a_narrow_stride_is_found() -> None:
    assert len(narrow_products(aot_defects.multiply(row_stride=4097))) == 2
