"""The worst relative error of emulated CUDA kernels against float64, by dtype: what ``gpu-numerics`` reports.

    python tests/gpu_offline/emulated_errors.py FILE

The sample is the product of few tokens and dequantization, for the formats that they know.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulation
from lora_problem import TOLERANCE, make_problem, relative_error

from peftkern.backends import cuda
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.lora_linear import Adapters, lora_linear_reference
from peftkern.ops.quantize import quantize_reference

SHAPES = ((1, 192, 130), (5, 64, 33), (16, 320, 64))
"""Tokens, inputs and outputs of a product."""


def product_errors(dtype: torch.dtype) -> Iterator[float]:
    for format in ("nf4", "fp4"):
        for double_quant in (False, True):
            for shape in SHAPES:
                problem = make_problem(*shape, [16], format, dtype, double_quant=double_quant)
                found, exact = (
                    run(one.x, one.weight, Adapters(one.lora_A, one.lora_B, one.scaling, [0.0], None), one.bias)[0]
                    for run, one in ((cuda.lora_linear, problem), (lora_linear_reference, problem.double()))
                )
                yield relative_error(found, exact)


def dequantize_errors(dtype: torch.dtype) -> Iterator[float]:
    for format in ("nf4", "fp4", "int8", "int8_blockwise"):
        torch.manual_seed(1)
        quantized = quantize_reference(torch.randn(37, 192), format)
        yield relative_error(cuda.dequantize(quantized, dtype), dequantize_reference(quantized, torch.float64))


def main() -> None:
    if cuda_emulation.MISSING is not None:
        raise SystemExit(cuda_emulation.MISSING)
    cuda_emulation.use(cuda_emulation.module_file())
    errors = {
        str(dtype).removeprefix("torch."): [*product_errors(dtype), *dequantize_errors(dtype)] for dtype in TOLERANCE
    }
    Path(sys.argv[-1]).write_text(json.dumps({"executor": "emulator", "errors": errors}))


if __name__ == "__main__":
    main()
