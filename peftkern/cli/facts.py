"""What this machine and this installation have, as data for ``peftkern doctor``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from peftkern import ops
from peftkern.backends import cpu, registry
from peftkern.cli import gpu_facts
from peftkern.finetune.versions import versions
from peftkern.formats import SparseIndices, random_mask
from peftkern.ops.adamw import coefficients_of, empty_moments
from peftkern.ops.linear_cross_entropy import Needs, Terms
from peftkern.ops.lora_linear import Adapters
from peftkern.ops.lora_linear_group import Member
from peftkern.ops.norm import NormForm
from peftkern.ops.select_top import PASSES, Scored

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "bitsandbytes")
_VARIABLES = (registry.ENVIRONMENT_VARIABLE, cpu.ENVIRONMENT_VARIABLE, "OMP_NUM_THREADS", "PEFTKERN_CACHE")


@dataclass(frozen=True)
class Choice:
    """Which backend would run an operation on some input; ``backend`` is ``None`` if none would."""

    operation: str
    input: str
    backend: str | None
    reason: str


def gather() -> dict[str, Any]:
    """All facts. ``usable`` is whether every operation runs on its typical inputs."""
    choices = list(_choices())
    return {
        "usable": all(choice.backend is not None for choice in choices),
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "cpu": _cpu(),
        "gpu": gpu_facts.gpus(),
        "gpu_kernels": gpu_facts.kernels(),
        "gpu_products": [asdict(one) for one in gpu_facts.products("cuda")] if torch.cuda.is_available() else [],
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "operations": [asdict(choice) for choice in choices],
    }


def _cpu() -> dict[str, Any]:
    try:
        chosen, problem = cpu.chosen_isa(), None
    except registry.BackendError as error:
        chosen, problem = None, str(error)
    return {
        "processor": _processor(),
        "native_module": cpu.available(),
        "native_module_missing_because": cpu.unavailable_reason(),
        "built": cpu.isa_names(),
        "supported": cpu.supported_isas(),
        "chosen": chosen,
        "not_chosen_because": problem,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _processor() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        except OSError:
            names = []
        if names:
            return names[0]
    return platform.processor() or platform.machine()


# ---- which backend would run what


Arguments = Callable[[], tuple[Any, ...]]


def typical_calls() -> Iterator[tuple[str, str, Arguments]]:
    """Operation, its input in words, and the arguments that the registry takes for it."""
    for format in ("nf4", "int8"):
        for dtype in (torch.float32, torch.bfloat16):
            text = f"{format} weight, {str(dtype).removeprefix('torch.')}"
            yield "lora_linear", text, partial(_forward, format, dtype)
            yield "lora_linear_backward", text, partial(_backward, format, dtype)
    yield "lora_linear", "dense weight, float32", partial(_forward, None, torch.float32)
    yield "lora_linear_backward", "dense weight, float32", partial(_backward, None, torch.float32)
    for weight in ("nf4", None):
        text = f"{weight or 'dense'} weight, float32"
        yield "masked_linear", text, partial(_masked_forward, weight)
        yield "masked_linear_backward", text, partial(_masked_backward, weight)
    for dtype in (torch.float32, torch.bfloat16):
        text = f"1% of a 128x128 matrix, {str(dtype).removeprefix('torch.')}"
        yield "sparse_delta", text, partial(_sparse_forward, dtype)
        yield "sparse_delta_backward", text, partial(_sparse_backward, dtype)
    for count, dtype in ((3, torch.float32), (2, torch.bfloat16)):
        text = f"{count} nf4 weights, {str(dtype).removeprefix('torch.')}"
        yield "lora_linear_group", text, partial(_group_forward, count, dtype)
        yield "lora_linear_group_backward", text, partial(_group_backward, count, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        text = f"nf4 weight, {str(dtype).removeprefix('torch.')}"
        yield "gated_lora_linear_backward", text, partial(_gated_backward, dtype)
    yield "quantize", "nf4, scales quantized as well", lambda: (_weight(None), "nf4", 64, True)
    yield "dequantize", "nf4 to float32", lambda: (_weight("nf4"), torch.float32)
    yield "dequantize", "nf4 to bfloat16", lambda: (_weight("nf4"), torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        gate = torch.zeros(_TOKENS, _FEATURES, dtype=dtype)
        text = str(dtype).removeprefix("torch.")
        yield "silu_mul", text, partial(tuple, (gate, gate))
        yield "silu_mul_backward", text, partial(tuple, (gate, gate, gate, True, True))
        states, angles = torch.zeros(1, 2, _TOKENS, 16, dtype=dtype), torch.zeros(1, _TOKENS, 16)
        yield "rotary", text, partial(tuple, ((states, states), angles, angles, False, False))
        logsumexp = torch.zeros(1, 2, _TOKENS)
        yield "attention", text, partial(tuple, (states, states, states, None, True, 0.25))
        backward = (states, states, states, states, states, logsumexp, None, True, 0.25, True, True, True)
        yield "attention_backward", text, partial(tuple, backward)
        rows, scale = torch.zeros(_TOKENS), torch.zeros(_FEATURES)
        yield "norm", text, partial(tuple, (gate, None, scale, None, NormForm(1e-6)))
        norm_backward = (gate, None, gate, scale, None, rows, NormForm(1e-6), True, False, False)
        yield "norm_backward", text, partial(tuple, norm_backward)
    labels = torch.zeros(_TOKENS, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head = torch.zeros(_TOKENS, _FEATURES, dtype=dtype), torch.zeros(_FEATURES, _FEATURES, dtype=dtype)
        loss = (hidden, head, None, labels, None, Terms(), Needs(True, False, False))
        yield "linear_cross_entropy", f"frozen head, {str(dtype).removeprefix('torch.')}", partial(tuple, loss)
    yield from _training_calls()


def _training_calls() -> Iterator[tuple[str, str, Arguments]]:
    weight, text = torch.zeros(_FEATURES, _FEATURES), "float32"
    coefficients, _ = coefficients_of(weight.device, 1e-3, (0.9, 0.999), 1e-8, 0.01, 1)
    yield "adamw", text, partial(tuple, (weight, weight, weight, weight, coefficients, None, None))
    moments = empty_moments(weight)
    yield "encode_moment", text, partial(tuple, (weight, True))
    yield "decode_moment", text, partial(tuple, (moments[0], moments[2], True))
    yield "adamw_8bit", text, partial(tuple, (weight, weight, *moments, coefficients, None, None))
    yield "adamw_probe", text, partial(tuple, (weight, weight, weight, weight, coefficients, None, None))
    yield "adamw_8bit_probe", text, partial(tuple, (weight, weight, *moments, coefficients, None, None))
    scored = Scored("magnitude", weight.view(-1), None, None)
    yield "score_histogram", text, partial(tuple, (scored, *PASSES[0], 0))
    yield "score_collect", text, partial(tuple, (scored, 0, 1, 1))
    yield "accumulate_importance", text, partial(tuple, (weight, weight, "square", None))
    yield "importance_dot", text, partial(tuple, (weight, weight))
    yield "probe_dot", text, partial(tuple, (weight, weight, weight))


_FEATURES, _TOKENS, _RANK = 128, 32, 16


def _weight(format: str | None) -> Any:
    dense = torch.linspace(-1, 1, _FEATURES * _FEATURES).reshape(_FEATURES, _FEATURES)
    return dense if format is None else ops.quantize(dense, format)


def _adapters() -> Adapters:
    lora_A, lora_B = torch.zeros(_RANK, _FEATURES), torch.zeros(_FEATURES, _RANK)
    return Adapters([lora_A], [lora_B], [2.0], [0.0], None)


def _forward(format: str | None, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.zeros(_TOKENS, _FEATURES, dtype=dtype), _weight(format), _adapters(), None


def _backward(format: str | None, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(_TOKENS, _FEATURES, dtype=dtype)
    return x, x, _weight(format), _adapters(), torch.zeros(_TOKENS, _RANK), True, [True, True]


def _masked_forward(format: str | None) -> tuple[Any, ...]:
    mask = random_mask((_FEATURES, _FEATURES), 0.5, seed=0)
    return torch.zeros(_TOKENS, _FEATURES), _weight(format), mask, _adapters(), None


def _masked_backward(format: str | None) -> tuple[Any, ...]:
    x, weight, mask, adapters, _bias = _masked_forward(format)
    return x, x, weight, mask, adapters, torch.zeros(_TOKENS, _RANK), True, format is None, [True, True]


def _sparse_forward(dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(_TOKENS, _FEATURES, dtype=dtype)
    indices = SparseIndices.from_flat(torch.arange(0, _FEATURES * _FEATURES, 100), (_FEATURES, _FEATURES))
    return x.clone(), x, torch.zeros(len(indices)), indices, 1.0


def _sparse_backward(dtype: torch.dtype) -> tuple[Any, ...]:
    y, x, values, indices, scaling = _sparse_forward(dtype)
    return y, x, x.clone(), values, indices, scaling, True


def _gated_backward(dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.zeros(_TOKENS, _FEATURES, dtype=dtype)
    return x, x, x, _weight("nf4"), _adapters(), torch.zeros(_TOKENS, _RANK), True, True, [True, True]


def _group_forward(count: int, dtype: torch.dtype) -> tuple[Any, ...]:
    member = Member(_weight("nf4"), _adapters(), None)
    return torch.zeros(_TOKENS, _FEATURES, dtype=dtype), [member] * count


def _group_backward(count: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, members = _group_forward(count, dtype)
    return [x] * count, x, members, torch.zeros(_TOKENS, _RANK * count), True, [[True, True]] * count


def _choices() -> Iterator[Choice]:
    for operation, text, arguments in typical_calls():
        try:
            choice = registry.choose(operation, *arguments())
        except (registry.BackendError, ValueError) as error:
            yield Choice(operation, text, None, str(error))
        else:
            yield Choice(operation, text, choice.backend, choice.reason)
