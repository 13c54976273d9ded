"""The CUDA backend on a GPU. Without one its kernels are emulated: ``tests/gpu_offline/test_cuda_kernels.py``."""

from __future__ import annotations

import executor
import pytest
import torch
from gpu_cases import DTYPES, gpu_problem
from lora_problem import TOLERANCE, Problem, relative_error
from same_bits import CASES, assert_same_bits, assert_same_quantized, random_tensor
from torch import Tensor

from peftkern.backends import cuda
from peftkern.formats import BLOCK_SIZES, QuantizedTensor
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.lora_linear import Adapters, lora_linear_reference
from peftkern.ops.quantize import quantize_reference

if executor.current() != executor.GPU:
    pytest.skip("the kernels of csrc/cuda run on a GPU or in their own emulator", allow_module_level=True)
pytestmark = pytest.mark.skipif(not cuda.available(), reason=str(cuda.unavailable_reason()))

SHAPES = [(4, 4096), (3, 1733), (70,), (1, 1), (129, 8192)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise", "int8"])
def test_quantize(format: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        w = random_tensor(shape, dtype)
        for block_size in BLOCK_SIZES if format != "int8" else (64,):
            if format == "int8" and w.dim() != 2:
                continue
            expected = quantize_reference(w, format, block_size)
            assert_same_quantized(cuda.quantize(w.cuda(), format, block_size).to("cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_dequantize(format: str, double_quant: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if format == "int8" and len(shape) != 2:
            continue
        q = quantize_reference(random_tensor(shape, torch.float32), format, 64, double_quant)
        assert_same_bits(cuda.dequantize(q.to("cuda"), dtype).cpu(), dequantize_reference(q, dtype))


def _run(problem: Problem) -> tuple[Tensor, Tensor]:
    adapters = Adapters(problem.lora_A, problem.lora_B, problem.scaling, problem.dropout_p, None)
    assert isinstance(problem.weight, QuantizedTensor)
    return cuda.lora_linear(problem.x, problem.weight, adapters, problem.bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_products(double_quant: bool, format: str, dtype: torch.dtype) -> None:
    for tokens, columns, rows, ranks in [(1, 64, 8, []), (3, 4160, 37, [16]), (16, 1088, 1030, [3, 150])]:
        problem = gpu_problem(tokens, columns, rows, ranks, format, dtype, double_quant=double_quant)
        exact = problem.double()
        adapters = Adapters(exact.lora_A, exact.lora_B, exact.scaling, exact.dropout_p, None)
        for result, expected in zip(
            _run(problem), lora_linear_reference(exact.x, exact.weight, adapters, exact.bias), strict=True
        ):
            assert relative_error(result, expected) <= TOLERANCE[result.dtype]


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_products_are_the_same_bits_every_time(tokens: int) -> None:
    problem = gpu_problem(tokens, 4096, 4096, [16], "nf4", torch.bfloat16)
    first = _run(problem)[0]
    for _ in range(20):
        assert_same_bits(_run(problem)[0].cpu(), first.cpu())


def _everything(w: Tensor, problem: Problem) -> list[Tensor]:
    q = cuda.quantize(w, "nf4", 64)
    rows = cuda.quantize(w, "int8")
    return [q.packed, q.scales, rows.packed, cuda.dequantize(q), cuda.dequantize(rows), *_run(problem)]


def _inputs() -> tuple[Tensor, Problem]:
    return random_tensor((512, 1024), torch.bfloat16).cuda(), gpu_problem(2, 1024, 256, [8], "nf4", torch.bfloat16)


def _assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, right in zip(results, expected, strict=True):
        assert_same_bits(result.cpu(), right.cpu())


def test_kernels_run_on_the_current_stream() -> None:
    w, problem = _inputs()
    expected = _everything(w, problem)
    late, late_problem = torch.zeros_like(w), gpu_problem(2, 1024, 256, [8], "nf4", torch.bfloat16)
    late_problem.x.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream the kernels would read zeros
        late.copy_(w)
        late_problem.x.copy_(problem.x)
        results = _everything(late, late_problem)
    stream.synchronize()
    _assert_same(results, expected)


def test_a_graph_captures_them() -> None:
    w, problem = _inputs()
    expected = _everything(w, problem)
    inputs, values = (w, problem.x), (w.clone(), problem.x.clone())
    for tensor in inputs:
        tensor.fill_(1.0)  # captured with other numbers than it is replayed with
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _everything(w, problem)
    for tensor, value in zip(inputs, values, strict=True):
        tensor.copy_(value)
    graph.replay()
    _assert_same(results, expected)
