"""Exact kernels round every operation to nearest, keep denormals and contract nothing: read off their PTX."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from peftkern.backends.triton.specializations import (
    ENTRIES,
    ENTRY_VARIANTS,
    TENSORS,
    GateCase,
    Specialization,
    specializations,
)

ROUNDED = re.compile(r"\b(?:add|sub|mul|div|fma|rcp|ex2|lg2|sqrt|rsqrt)\.[.\w]*f32\w*")
EXACT = re.compile(r"(?:add|sub|mul|div|sqrt)\.rn\.f32(?:x2)?")


def float_operations(specialization: Specialization, architecture: int, **options: Any) -> set[str]:
    """The PTX instructions that round a float32."""
    target = GPUTarget("cuda", architecture, 32)
    options = {**specialization.options, **options}
    ptx = triton.compile(specialization.source(), target=target, options=options).asm["ptx"]
    return set(ROUNDED.findall(ptx))


def inexact(operations: set[str]) -> set[str]:
    return {operation for operation in operations if not EXACT.fullmatch(operation)}


@pytest.mark.parametrize("architecture", [80, 120])
def test_quantize_and_dequantize_round_to_nearest_and_contract_nothing(architecture: int) -> None:
    found = {one.name: float_operations(one, architecture) for one in specializations(architecture, [], TENSORS)}
    assert len(found) > len(TENSORS)
    for name, operations in found.items():
        assert operations, name
        assert inexact(operations) == set(), name
        assert ("div.rn.f32" in operations) == (": quantize" in name), name


@pytest.mark.parametrize("architecture", [80, 120])
def test_updates_scores_and_sums_round_to_nearest_and_contract_nothing(architecture: int) -> None:
    cases = [case for case in (*ENTRIES, *ENTRY_VARIANTS) if not isinstance(case, GateCase)]
    for one in specializations(architecture, [], cases):
        operations = float_operations(one, architecture)
        assert inexact(operations) == set(), one.name
        takes_roots = one.kernel.startswith(("adamw", "norm_kernel"))
        assert ({"div.rn.f32", "sqrt.rn.f32"} <= operations) == takes_roots, one.name


def test_a_contraction_would_be_found() -> None:
    (nested,) = (one for one in specializations(90, [], TENSORS) if one.name == "nf4 nested: dequantize_blocks")
    assert "fma.rn.f32" in inexact(float_operations(nested, 90, enable_fp_fusion=True))
