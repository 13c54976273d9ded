"""A weight under a bit mask on the device.

The masked weight is bit for bit the decoded one, with zeros where the mask has none; products agree with float64.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_cases import DEVICE, assert_close
from lora_problem import Problem, make_problem
from same_bits import CASES, DTYPES, assert_same_bits, random_tensor
from torch import Tensor

from peftkern.backends import registry
from peftkern.backends.triton import crossover, launch
from peftkern.backends.triton.crossover import Path
from peftkern.backends.triton.masked_dequantize import masked_dequantize
from peftkern.formats import BitMask, QuantizedTensor, group_mask, random_mask
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.masked_linear import masked_linear
from peftkern.ops.quantize import quantize_reference

SHAPES = [(5, 64), (3, 1028), (70, 33), (1, 1), (2, 2048), (9, 1000)]


def _expected(weight: Weight, mask: BitMask, dtype: torch.dtype) -> Tensor:
    dense = dequantize_reference(weight, dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)
    return torch.where(mask.mask(), dense, torch.zeros_like(dense))


def _assert_exact(weight: Weight, mask: BitMask, dtype: torch.dtype) -> None:
    out = torch.full((mask.shape[0] + 2, mask.shape[1]), 7.0, dtype=dtype, device=DEVICE)
    masked_dequantize(weight.to(DEVICE), mask.to(DEVICE), out[1:-1])
    assert_same_bits(out[1:-1].cpu(), _expected(weight, mask, dtype))
    assert (out[[0, -1]] == 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    _assert_exact(random_tensor(shape, dtype), random_mask(shape, 0.5, 3), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_quantized(format: str, double_quant: bool, shape: tuple[int, int]) -> None:
    weight = quantize_reference(random_tensor(shape, torch.float32), format, 64, double_quant)
    _assert_exact(weight, random_mask(shape, 0.3, 5), torch.bfloat16)


@pytest.mark.parametrize("block_size", [32, 2048])
def test_blocks_shorter_and_longer_than_a_program(block_size: int) -> None:
    weight = quantize_reference(random_tensor((3, 4096), torch.float32), "nf4", block_size)
    _assert_exact(weight, random_mask((3, 4096), 0.5, 1), torch.float16)


# ---- the operation


def _results(problem: Problem, mask: BitMask, backend: str, trained: bool) -> dict[str, Tensor]:
    """y and every gradient; that of the weight where it is ``trained``."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    x, lora_A, lora_B = leaf(problem.x), [leaf(a) for a in problem.lora_A], [leaf(b) for b in problem.lora_B]
    weight = leaf(problem.weight) if trained and isinstance(problem.weight, Tensor) else problem.weight
    torch.manual_seed(11)
    options = (problem.scaling, problem.bias, problem.dropout_p)
    y = masked_linear(x, weight, mask, lora_A, lora_B, *options, backend=backend)
    y.backward(problem.grad)
    leaves = {"x": x, "weight": weight, **{f"A{i}": a for i, a in enumerate(lora_A)}}
    leaves |= {f"B{i}": b for i, b in enumerate(lora_B)}
    gradients = {name: one.grad for name, one in leaves.items() if isinstance(one, Tensor) and one.grad is not None}
    return {"y": y.detach()} | gradients


def _assert_agrees(problem: Problem, mask: BitMask, path: Path, trained: bool = False) -> dict[str, Tensor]:
    problem, mask = problem.to(DEVICE), mask.to(DEVICE)
    with crossover.forced(path):
        results = _results(problem, mask, "triton", trained)
    assert_close(results, _results(problem.double(), mask, "reference", trained), problem.x.dtype)
    return results


DENSE_PATHS = [pytest.param(path, id=path.value) for path in (Path.FEW, Path.STAGED, Path.VENDOR)]


@pytest.mark.parametrize("path", DENSE_PATHS)
@pytest.mark.parametrize("format", ["dense", "nf4", "int8_blockwise", "int8"])
def test_a_frozen_weight(format: str, path: Path) -> None:
    problem = make_problem(17, 96, 80, [8], format, torch.bfloat16)
    _assert_agrees(problem, random_mask((80, 96), 0.5, 1), path)


@pytest.mark.parametrize("path", DENSE_PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_weight(dtype: torch.dtype, path: Path) -> None:
    problem = make_problem(17, 100, 33, [8], "dense", dtype)
    mask = random_mask((33, 100), 0.4, 2)
    results = _assert_agrees(problem, mask, path, trained=True)
    assert not results["weight"].cpu()[~mask.mask()].any()


def test_a_trained_weight_in_float32_under_half_precision() -> None:
    problem = make_problem(17, 100, 33, [8], "dense", torch.bfloat16)
    assert isinstance(problem.weight, Tensor)
    problem.weight = problem.weight.float()
    results = _assert_agrees(problem, random_mask((33, 100), 0.4, 2), Path.VENDOR, trained=True)
    assert results["weight"].dtype == torch.float32


def test_what_the_mask_leaves_out_never_matters() -> None:
    problem = make_problem(5, 64, 48, [4], "dense", torch.float32)
    mask = group_mask(random_tensor((48, 64), torch.float32), (2, 4))
    assert isinstance(problem.weight, Tensor)
    spoilt = dataclasses.replace(problem, weight=problem.weight.masked_fill(~mask.mask(), float("nan")))
    expected, found = (_results(one.to(DEVICE), mask.to(DEVICE), "triton", True) for one in (problem, spoilt))
    for name in expected:
        assert_same_bits(found[name], expected[name])


def test_without_adapters_and_without_tokens() -> None:
    mask = random_mask((80, 96), 0.5, 1)
    _assert_agrees(make_problem(9, 96, 80, [], "nf4", torch.float32), mask, Path.STAGED)
    empty = _results(make_problem(0, 96, 80, [4], "dense", torch.float32).to(DEVICE), mask.to(DEVICE), "triton", True)
    assert empty["y"].shape == (0, 80)
    assert not empty["weight"].any() and empty["weight"].shape == (80, 96)


def test_masking_is_one_launch_forward_one_for_dx_and_one_for_dw() -> None:
    problem, mask = make_problem(9, 96, 80, [4], "dense", torch.float32), random_mask((80, 96), 0.5, 1)
    with launch.recording() as launches, crossover.forced(Path.VENDOR):
        _results(problem.to(DEVICE), mask.to(DEVICE), "triton", True)
    masking = [one for one in launches if one.kernel == "masked_dequantize_kernel"]
    weight = 4 * 80 * 96
    assert [(one.bytes_read, one.bytes_written) for one in masking] == [(weight + mask.bits.nbytes, weight)] * 3


@pytest.mark.parametrize("path", DENSE_PATHS)
def test_its_form_is_the_path_of_a_dense_weight(path: Path) -> None:
    problem, mask = make_problem(9, 96, 80, [4], "nf4", torch.float32).to(DEVICE), random_mask((80, 96), 0.5, 1)
    adapters = Adapters(problem.lora_A, problem.lora_B, problem.scaling, problem.dropout_p, None)
    operands = (problem.weight, mask.to(DEVICE), adapters)
    with crossover.forced(path):
        forward = registry.describe("masked_linear", problem.x, *operands, None)
        backward = registry.describe("masked_linear_backward", problem.grad, None, *operands, None, True, False, [])
    assert (forward, backward) == (f"triton ({path})", f"triton ({path})")
