"""The CUDA kernels, run by the emulator: bits, errors, orders of threads, sanitizers, tensors past 2^31 elements."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_emulation import ADDRESSES, KERNELS, ORDERS, PLAIN, THREADS
from lora_problem import TOLERANCE, Problem, make_problem, relative_error
from same_bits import assert_same_bits, random_tensor
from torch import Tensor

from peftkern.backends import cuda
from peftkern.formats import QuantizedTensor
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.lora_linear import Adapters, lora_linear_reference
from peftkern.ops.quantize import quantize_reference

pytestmark = pytest.mark.skipif(cuda_emulation.MISSING is not None, reason=str(cuda_emulation.MISSING))

TESTS = Path(__file__).parents[1]
SetOptions = Callable[..., None]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> SetOptions:
    """The CUDA backend takes CPU tensors. Returns what sets the emulator's options."""
    file = cuda_emulation.module_file()
    cuda_emulation.use(file, monkeypatch.setattr)
    cuda_emulation.set_options(file)
    return lambda **options: cuda_emulation.set_options(file, **options)


# ---- quantize, dequantize


def test_quantize_and_dequantize_pass_the_tests_of_every_backend() -> None:
    """Those of ``tests/ops``, most of which compare with bitsandbytes bit for bit."""
    environment = {
        "EMULATED_MODULE": str(cuda_emulation.module_file()),
        "PYTHONPATH": os.pathsep.join([str(TESTS / "gpu_offline"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    files = [str(TESTS / "ops" / name) for name in ("test_quantize.py", "test_dequantize.py")]
    options = ["-p", "emulated_operations", "-p", "no:cacheprovider", "-k", "cpu"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200, result.stdout  # type: ignore[index]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise", "int8"])
def test_any_order_of_the_threads_gives_the_same_bits(emulated: SetOptions, format: str, order: str) -> None:
    emulated(order=order, seed=3, workers=2)
    w = random_tensor((3, 2083), torch.float16)
    q = cuda.quantize(w, format, 1024)
    expected = quantize_reference(w, format, 1024)
    assert_same_bits(q.packed, expected.packed)
    assert_same_bits(q.scales, expected.scales)
    assert_same_bits(cuda.dequantize(expected), dequantize_reference(expected))


# ---- lora_linear


def _adapters(problem: Problem) -> Adapters:
    return Adapters(problem.lora_A, problem.lora_B, problem.scaling, problem.dropout_p, None)


def _assert_close(problem: Problem) -> None:
    assert isinstance(problem.weight, QuantizedTensor)
    y, h = cuda.lora_linear(problem.x, problem.weight, _adapters(problem), problem.bias)
    exact = problem.double()
    expected_y, expected_h = lora_linear_reference(exact.x, exact.weight, _adapters(exact), exact.bias)
    assert (y.dtype, h.dtype) == (problem.x.dtype, torch.float32)
    assert relative_error(y, expected_y) <= TOLERANCE[problem.x.dtype]
    assert relative_error(h, expected_h) <= TOLERANCE[torch.float32]


PRODUCTS = [
    # tokens, in, out, ranks: lanes without columns, rows and tokens beyond the last, every number of adapters
    (1, 64, 8, []),
    (1, 4160, 7, [16]),
    (2, 1088, 4, [1]),
    (4, 256, 33, [140, 3]),
    (5, 2048, 6, [8]),
    (16, 1088, 18, [3, 5, 2, 1]),
    (13, 128, 1, [16]),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_products_agree_with_float64(emulated: SetOptions, double_quant: bool, format: str, dtype: torch.dtype) -> None:
    for index, (tokens, columns, rows, ranks) in enumerate(PRODUCTS):
        factors = list(TOLERANCE)[index % 3]
        options: dict[str, Any] = {"double_quant": double_quant, "factor_dtype": factors, "bias": index % 2 == 0}
        _assert_close(make_problem(tokens, columns, rows, ranks, format, dtype, block_size=64, **options))


@pytest.mark.parametrize("block_size", [32, 128, 1024])
def test_products_with_other_blocks(emulated: SetOptions, block_size: int) -> None:
    _assert_close(make_problem(3, 2048, 5, [4], "nf4", torch.bfloat16, block_size=block_size, double_quant=True))


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_products_are_the_same_bits_in_any_order(emulated: SetOptions, tokens: int) -> None:
    problem = make_problem(tokens, 1088, 9, [5], "nf4", torch.bfloat16)
    results = []
    for order in ORDERS:
        emulated(order=order, seed=2, workers=2)
        results.append(cuda.lora_linear(problem.x, problem.weight, _adapters(problem), problem.bias))
    for y, h in results[1:]:
        assert_same_bits(y, results[0][0])
        assert_same_bits(h, results[0][1])


def _shifted(tensor: Tensor, elements: int = 1) -> Tensor:
    """The same values at an address that is not aligned."""
    memory = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return memory[elements:].view(tensor.shape).copy_(tensor)


def test_activations_and_factors_may_lie_anywhere(emulated: SetOptions) -> None:
    problem = make_problem(5, 128, 6, [4], "nf4", torch.float16)
    wide = torch.full((5, 3 * 128), torch.nan, dtype=torch.float16)
    layouts = {
        "rows apart": wide[:, 128:256].copy_(problem.x),
        "turned": problem.x.t().contiguous().t(),
        "shifted": _shifted(problem.x),
        "rows apart and shifted": wide[:, 1:129].copy_(problem.x),
    }
    for layout in layouts.values():
        _assert_close(replace(problem, x=layout))
    _assert_close(
        replace(problem, lora_A=[_shifted(problem.lora_A[0])], lora_B=[problem.lora_B[0].t().contiguous().t()])
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token(emulated: SetOptions, value: float) -> None:
    problem = make_problem(4, 96, 6, [2], "nf4", torch.bfloat16, block_size=32)
    clean, _ = cuda.lora_linear(problem.x, problem.weight, _adapters(problem), problem.bias)
    problem.x[1, 95] = value
    y, _ = cuda.lora_linear(problem.x, problem.weight, _adapters(problem), problem.bias)
    others = torch.tensor([0, 2, 3])
    assert not y[1].isfinite().any()
    assert_same_bits(y[others], clean[others])


def test_no_tokens(emulated: SetOptions) -> None:
    problem = make_problem(0, 64, 8, [4], "nf4", torch.bfloat16)
    y, h = cuda.lora_linear(problem.x, problem.weight, _adapters(problem), problem.bias)
    assert (y.shape, h.shape) == ((0, 8), (0, 4))


# ---- the native module


def test_a_failed_launch_is_an_exception(emulated: SetOptions) -> None:
    scales = (0, 0, 0, 0, 0)
    native = cuda._load()[0]
    with pytest.raises(RuntimeError, match="dequantize: invalid configuration argument"):
        native.dequantize((0, 0), (0, 3, 1, 2**60, 0, 6, scales), 0, 0)
    with pytest.raises(ValueError, match="too many adapters"):
        native.few_token_product(
            (0, 0), 0, 64, 0, 1, (0, 3, 1, 64, 0, 6, scales), [(0, 0, 0, 0, 1, 1.0)] * 5, 0, 0, 0, 0
        )


def test_limits_are_those_of_the_kernels(emulated: SetOptions) -> None:
    native = cuda._load()[0]
    assert (native.max_tokens, native.max_adapters) == (cuda.MAX_TOKENS, cuda.MAX_ADAPTERS)


# ---- tensors past 2^31 elements: only their ends are written, read and computed


def test_quantize_blocks_past_two_to_the_31(emulated: SetOptions) -> None:
    elements, tail = 2**31 + 4096 * 5 + 77, 4096 + 77
    w = torch.empty(elements, dtype=torch.bfloat16)
    w[-tail:] = random_tensor((tail,), torch.bfloat16)
    for format in ("nf4", "int8_blockwise"):
        emulated(first_block=elements // 4096 - 1)
        q, expected = cuda.quantize(w, format), quantize_reference(w[-tail:], format)
        assert_same_bits(q.packed[-expected.packed.numel() :], expected.packed)
        assert_same_bits(q.scales[-expected.scales.numel() :], expected.scales)


def test_quantize_rows_past_two_to_the_31(emulated: SetOptions) -> None:
    rows = 2**25 + 3
    w = torch.empty(rows, 64, dtype=torch.float16)
    w[-2:] = random_tensor((2, 64), torch.float16)
    emulated(first_block=rows - 2)
    q, expected = cuda.quantize(w, "int8"), quantize_reference(w[-2:], "int8")
    assert_same_bits(q.packed[-2:], expected.packed)
    assert_same_bits(q.scales[-2:], expected.scales)


@pytest.mark.parametrize(("format", "per_block"), [("nf4", 8192), ("int8_blockwise", 4096)])
def test_dequantize_past_two_to_the_31(emulated: SetOptions, format: str, per_block: int) -> None:
    elements, tail = 2**31 + per_block * 5 + 64, per_block + 64
    codes = torch.arange(256).to(torch.uint8).repeat(per_block // 128)
    packed = torch.empty(elements // 2 if format == "nf4" else elements, dtype=torch.uint8)
    packed[-codes.numel() :] = codes
    scales = torch.empty(elements // 64, dtype=torch.float32)
    scales[-tail // 64 :] = random_tensor((tail // 64,), torch.float32)
    emulated(first_block=elements // per_block - 1)
    out = cuda.dequantize(QuantizedTensor(packed, scales, format, torch.Size([elements]), torch.bfloat16, 64))
    bytes_of_tail = tail // 2 if format == "nf4" else tail
    end = QuantizedTensor(
        packed[-bytes_of_tail:], scales[-tail // 64 :], format, torch.Size([tail]), torch.bfloat16, 64
    )
    assert_same_bits(out[-tail:], dequantize_reference(end))


def test_dequantize_rows_past_two_to_the_31(emulated: SetOptions) -> None:
    rows, columns = 2049, 2**20
    packed = torch.empty(rows, columns, dtype=torch.int8)
    packed[-1, -4096:] = torch.arange(4096).to(torch.int8)
    scales = torch.ones(rows)
    blocks = columns // 4096
    emulated(first_block=rows * blocks - 1)
    q = QuantizedTensor(packed, scales, "int8", torch.Size([rows, columns]), torch.bfloat16, columns)
    end = replace(q, packed=packed[-1:, -4096:], scales=scales[-1:], shape=torch.Size([1, 4096]), block_size=4096)
    assert_same_bits(cuda.dequantize(q)[-1:, -4096:], dequantize_reference(end))


def test_product_past_two_to_the_31(emulated: SetOptions) -> None:
    rows, columns = 2**20 + 4, 4096
    problem = make_problem(2, columns, 4, [], "nf4", torch.float32, bias=False)
    end = problem.weight
    assert isinstance(end, QuantizedTensor)
    packed, scales = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns // 64)
    packed[-4:], scales[-4:] = end.packed, end.scales
    weight = replace(end, packed=packed, scales=scales, shape=torch.Size([rows, columns]))
    emulated(first_block=rows // 4 - 1)
    y, _ = cuda.lora_linear(problem.x, weight, _adapters(problem), None)
    expected, _ = lora_linear_reference(problem.x.double(), end, _adapters(problem), None)
    assert relative_error(y[:, -4:], expected) <= TOLERANCE[torch.float32]


# ---- sanitizers


@pytest.fixture(scope="module")
def plain_results() -> str:
    """What every call of the kernels gives, a line each."""
    result = cuda_emulation.run(cuda_emulation.every_kernel(PLAIN))
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) > 50
    return result.stdout


@pytest.mark.parametrize(
    ("mode", "order", "seed", "workers"),
    [
        *((PLAIN, order, 1, 2) for order in ORDERS),
        *((PLAIN, "random", seed, 3) for seed in (2, 3, 4)),
        (ADDRESSES, "random", 5, 1),
        (THREADS, "greedy", 1, 2),
    ],
)
def test_every_kernel_is_clean_and_gives_the_same(
    plain_results: str, mode: str, order: str, seed: int, workers: int
) -> None:
    result = cuda_emulation.run(cuda_emulation.every_kernel(mode), order=order, seed=seed, workers=workers)
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout == plain_results


BARRIER = "__syncthreads();"
BARRIERS = [(file, number) for file in KERNELS for number in range(file.read_text().count(BARRIER))]


@pytest.mark.parametrize(("file", "number"), BARRIERS, ids=[f"{file.stem}-{number}" for file, number in BARRIERS])
def test_no_barrier_can_be_left_out(tmp_path: Path, file: Path, number: int) -> None:
    parts = file.read_text().split(BARRIER)
    changed = tmp_path / file.name
    changed.write_text(BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :]))
    result = cuda_emulation.run(cuda_emulation.every_kernel(THREADS, changed), order="random", workers=2)
    assert "data race" in result.stderr
