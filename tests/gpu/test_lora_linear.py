"""lora_linear and its group on a GPU, against float64: every path, format, dtype, shape and layout.

Sizes are small, for executors without a GPU, and still give several programs, several steps and a last one in part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from gpu_cases import (
    DEVICE,
    DTYPES,
    PATHS,
    Group,
    assert_agrees,
    assert_close,
    gpu_problem,
    launched,
    make_group,
    on_path,
)
from lora_problem import TOLERANCE, relative_error
from torch import Tensor

from peftkern import ops
from peftkern.backends.triton.crossover import Path
from peftkern.formats import QuantizedTensor

# ---- one layer

WEIGHTS = {
    "dense": {},
    "float32": {"weight": "dense", "weight_dtype": torch.float32},
    "bfloat16": {"weight": "dense", "weight_dtype": torch.bfloat16},
    "nf4": {"weight": "nf4"},
    "fp4": {"weight": "fp4"},
    "int8": {"weight": "int8"},
    "int8_blockwise": {"weight": "int8_blockwise"},
    "nf4-double": {"weight": "nf4", "double_quant": True},
    "int8_blockwise-double": {"weight": "int8_blockwise", "double_quant": True},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_weight_and_dtype(weight: str, dtype: torch.dtype, path: Path) -> None:
    options = {"weight": "dense"} | WEIGHTS[weight]
    assert_agrees(gpu_problem(37, 192, 130, [16], dtype=dtype, **options), path)


SHAPES = [  # tokens, in, out, rank
    (1, 64, 64, 1),
    (16, 128, 64, 8),
    (15, 127, 63, 16),
    (17, 129, 65, 48),
    (13, 97, 53, 7),
    (3, 1, 1, 1),
    (64, 256, 128, 16),
    (65, 320, 257, 33),
    (128, 128, 256, 16),
    (129, 80, 48, 130),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight", ["nf4", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int, int, int], weight: str, path: Path) -> None:
    tokens, in_features, out_features, rank = shape
    assert_agrees(gpu_problem(tokens, in_features, out_features, [rank], weight, torch.bfloat16), path)


@pytest.mark.parametrize("path", [Path.FEW, Path.FUSED, Path.STAGED])
@pytest.mark.parametrize("weight", ["nf4", "int8_blockwise"])
@pytest.mark.parametrize("block_size", [32, 128, 256])
@pytest.mark.parametrize("in_features", [512, 288, 75])  # whole blocks, blocks across rows, odd nibbles
def test_every_block_size(in_features: int, block_size: int, weight: str, path: Path) -> None:
    options = {"block_size": block_size, "double_quant": True}
    assert_agrees(gpu_problem(9, in_features, 70, [4], weight, torch.float16, **options), path)


def test_scales_of_the_scales_in_several_blocks() -> None:
    assert_agrees(gpu_problem(5, 512, 80, [4], block_size=32, double_quant=True), Path.FUSED)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight", ["nf4", "dense"])
def test_several_adapters_with_dropout(weight: str, path: Path) -> None:
    assert_agrees(gpu_problem(37, 192, 130, [16, 3, 20], weight, torch.bfloat16, dropout_p=0.3), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout_mask_of_the_reference(dropout_p: float, path: Path) -> None:
    assert_agrees(gpu_problem(40, 100, 70, [5], "dense", torch.float32, dropout_p=dropout_p), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ranks", [[], [8]])
def test_without_adapter_or_bias(ranks: list[int], path: Path) -> None:
    assert_agrees(gpu_problem(20, 128, 72, ranks, "nf4", torch.bfloat16, bias=False), path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_dtype_of_the_adapter(dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    problem = gpu_problem(33, 96, 80, [8], "nf4", dtype, factor_dtype=factor_dtype)
    with on_path(Path.FUSED, problem):
        results = problem.run("triton")
    truth = problem.double().run("reference")
    assert results["A0"].dtype == results["B0"].dtype == factor_dtype
    coarser = max(dtype, factor_dtype, key=TOLERANCE.__getitem__)
    for name in truth:
        assert relative_error(results[name], truth[name]) <= TOLERANCE[coarser if name in ("A0", "B0") else dtype]


@pytest.mark.parametrize("path", PATHS)
def test_sums_cut_into_parts(path: Path) -> None:
    """So many columns, or tokens, that programs share a sum, and a second launch adds up."""
    assert_agrees(gpu_problem(3, 2112, 40, [8], "nf4", torch.bfloat16), path)
    if path != Path.FEW:
        assert_agrees(gpu_problem(1060, 64, 40, [4], "nf4", torch.bfloat16), path)


@pytest.mark.parametrize("path", PATHS)
def test_many_outputs(path: Path) -> None:
    """g is left in parts that its readers add up."""
    assert_agrees(gpu_problem(20, 64, 700, [8], "nf4", torch.bfloat16, dropout_p=0.2), path)


def test_precision_below_highest_may_round_to_tf32() -> None:
    problem = gpu_problem(40, 512, 96, [8], "nf4", torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        with on_path(Path.FUSED, problem):
            results = problem.run("triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(results, problem.double().run("reference"), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype: torch.dtype) -> None:
    problem = gpu_problem(0, 64, 48, [4], "nf4", dtype)
    results = problem.run("triton")
    assert results["y"].shape == (0, 48)
    assert results["x"].shape == (0, 64)
    assert all(not results[name].any() for name in ("A0", "B0", "bias"))


def test_batch_dimensions() -> None:
    problem = gpu_problem(12, 64, 48, [4], "nf4", torch.bfloat16)
    cube = dataclasses.replace(problem, x=problem.x.view(3, 4, 64), grad=problem.grad.view(3, 4, 48))
    results, expected = cube.run("triton"), problem.run("triton")
    assert results["y"].shape == (3, 4, 48)
    assert all(torch.equal(results[name], expected[name].view_as(results[name])) for name in expected)


# ---- layouts


def _with_row_stride(matrix: Tensor) -> Tensor:
    wide = torch.full((matrix.shape[0], matrix.shape[1] + 3), float("nan"), dtype=matrix.dtype, device=matrix.device)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def _with_column_stride(matrix: Tensor) -> Tensor:
    wide = torch.full((matrix.shape[0], 2 * matrix.shape[1]), float("nan"), dtype=matrix.dtype, device=matrix.device)
    wide[:, ::2] = matrix
    return wide[:, ::2]


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", [_with_row_stride, _with_column_stride, _transposed])
def test_layouts_give_the_same_bits(layout: Callable[[Tensor], Tensor], path: Path) -> None:
    problem = gpu_problem(20, 96, 72, [8], "dense", torch.bfloat16, dropout_p=0.2)
    assert isinstance(problem.weight, Tensor)
    strided = dataclasses.replace(
        problem,
        x=layout(problem.x),
        weight=layout(problem.weight),
        lora_A=[layout(a) for a in problem.lora_A],
        lora_B=[layout(b) for b in problem.lora_B],
        grad=layout(problem.grad),
    )
    with on_path(path, problem):
        expected, results = problem.run("triton"), strided.run("triton")
    if path == Path.VENDOR:  # whose order of sums may depend on the layout
        assert_close(results, strided.double().run("reference"), problem.x.dtype)
        return
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_gradient_of_a_sum_has_no_strides() -> None:
    problem = gpu_problem(20, 96, 72, [8], "nf4", torch.bfloat16)
    expanded = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(20, 72)
    assert_agrees(dataclasses.replace(problem, grad=expanded), Path.FUSED)


# ---- a group

OUTS = [pytest.param(outs, id="-".join(map(str, outs))) for outs in ([130, 48], [96, 33, 70])]


def check(group: Group, path: Path) -> None:
    with on_path(path, group.layers[0]):
        results = group.run()
    assert_close(results, group.truth(), group.x.dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs", OUTS)
@pytest.mark.parametrize("weight", ["nf4", "dense"])
def test_group(weight: str, outs: list[int], dtype: torch.dtype, path: Path) -> None:
    check(make_group(37, 192, outs, [16], weight=weight, dtype=dtype), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight", ["int8", "fp4", "int8_blockwise"])
def test_group_of_every_format(weight: str, path: Path) -> None:
    double_quant = weight != "int8"
    check(make_group(18, 128, [70, 33, 40], [5], weight=weight, dtype=torch.bfloat16, double_quant=double_quant), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ranks", [[], [8], [8, 3], [80]], ids=str)
def test_group_with_dropout(ranks: list[int], path: Path) -> None:
    check(make_group(20, 128, [70, 33, 40], ranks, dtype=torch.bfloat16, dropout_p=0.25), path)


@pytest.mark.parametrize("path", PATHS)
def test_group_with_ranks_of_its_own_each(path: Path) -> None:
    group = make_group(20, 128, [70, 33], [16], dtype=torch.bfloat16)
    other = gpu_problem(20, 128, 40, [3], "nf4", torch.bfloat16, seed=9)
    check(Group([*group.layers, other], group.seed), path)


def test_group_of_unlike_layers() -> None:
    """What no launch can take together is taken apart: other formats, other numbers of adapters, no bias."""
    layers = [
        gpu_problem(20, 128, 70, [16], "nf4", torch.bfloat16, seed=1),
        gpu_problem(20, 128, 33, [8, 4], "nf4", torch.bfloat16, seed=2),
        gpu_problem(20, 128, 40, [4], "dense", torch.bfloat16, bias=False, seed=3),
        gpu_problem(20, 128, 24, [], "int8", torch.bfloat16, seed=4),
    ]
    check(Group(layers, torch.tensor(5)), Path.FUSED)


def test_group_without_tokens() -> None:
    results = make_group(0, 64, [48, 32], [4]).run()
    assert results["y1"].shape == (0, 32)
    assert not results["B1.0"].any()


# ---- what is asked for


@pytest.mark.parametrize("path", [Path.FUSED, Path.VENDOR])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("need_A", [True, False])
@pytest.mark.parametrize("need_B", [True, False])
def test_only_what_is_asked_for(need_B: bool, need_A: bool, need_x: bool, path: Path) -> None:
    group = make_group(40, 64, [48, 33], [4, 9], dtype=torch.bfloat16)
    flags = [[need_A, False, need_B, need_B], [False, need_A, False, need_B]]
    with on_path(path, group.layers[0]):
        results = group.run(need_x, flags)
    assert_close(results, group.truth(need_x, flags), torch.bfloat16)


def test_no_gradient_of_x_needs_no_weight() -> None:
    group = make_group(40, 64, [48], [4], dtype=torch.bfloat16)
    with_x, without = launched(group.run), launched(lambda: group.run(need_x=False))
    assert len(without) < len(with_x)
    assert set(without) <= set(with_x)


# ---- paths


def test_every_path_has_its_own_launches() -> None:
    problem = gpu_problem(20, 128, 72, [8], "nf4", torch.bfloat16)
    launches = {}
    for path in Path:
        with on_path(path, problem):
            launches[path] = launched(lambda: problem.run("triton"))
    assert len(set(map(tuple, launches.values()))) == len(Path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_from_run_to_run(dtype: torch.dtype, path: Path) -> None:
    problem = gpu_problem(60, 1100, 90, [16], "nf4", dtype, dropout_p=0.2)
    with on_path(path, problem):
        first, second = problem.run("triton"), problem.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("path", [Path.STAGED, Path.VENDOR])
def test_layers_share_the_scratch_buffer(path: Path) -> None:
    problems = [gpu_problem(20, size, size + 8, [4], "nf4", torch.bfloat16, seed=size) for size in (128, 64, 192)]
    with on_path(path, problems[0]):
        outputs = [ops.lora_linear(p.x, p.weight, bias=p.bias, backend="triton") for p in problems]
    for problem, y in zip(problems, outputs, strict=True):
        assert isinstance(problem.weight, QuantizedTensor)
        exact = ops.lora_linear(problem.x.double(), problem.weight, bias=problem.bias, backend="reference")
        assert relative_error(y, exact) <= TOLERANCE[torch.bfloat16]
