"""The one table of benchmarks. A new benchmark is one more entry here and the function that the entry names."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peftkern.bench.errors import BenchError


@dataclass(frozen=True)
class Setting:
    """Environment variables for the process in which a benchmark's cases run. ``label`` is added to their names."""

    label: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


AS_SHIPPED = Setting()

ALLOCATOR_TUNED = Setting(
    "allocator tuned",
    {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"},
)
"""glibc keeps large buffers instead of giving them back. The peer decodes each weight into a fresh buffer, and by
default pays for page faults every time: this takes them away. Both sides run in it."""


@dataclass(frozen=True)
class Benchmark:
    """A name, and the function that yields its cases.

    ``cases`` is ``"module:function"``, so that listing the names imports nothing. The function takes no arguments and
    yields :class:`Case` (to be timed) or :class:`Measurement` (measured by the benchmark itself). It runs once per
    setting, in a fresh process, and each case is measured before the next is asked for. ``packages`` are what it needs
    beside peftkern: the peer's, or the compiler whose output is counted.
    """

    name: str
    summary: str
    cases: str
    settings: Sequence[Setting] = (AS_SHIPPED,)
    packages: Sequence[str] = ("peft", "bitsandbytes")


_BOTH_ALLOCATORS = (AS_SHIPPED, ALLOCATOR_TUNED)
_COUNTED = ("peft", "bitsandbytes", "triton")

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "linear-nf4-highest",
            "one NF4 LoRA linear 4096x4096, r=16, forward and backward, fp32 at precision 'highest'",
            "peftkern.bench.linear:highest",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "linear-nf4-high",
            "the same, fp32 at precision 'high'",
            "peftkern.bench.linear:high",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "linear-nf4-bf16",
            "the same, bf16 activations and compute",
            "peftkern.bench.linear:bf16",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "sparse-linear-0.1",
            "a sparse delta's own work on a linear 4096x4096 at 0.1% density, 512 tokens: product, part of dX, dS",
            "peftkern.bench.sparse_linear:one_in_thousand",
            _BOTH_ALLOCATORS,
            packages=(),
        ),
        Benchmark(
            "sparse-linear-1",
            "the same at 1% density",
            "peftkern.bench.sparse_linear:one_in_hundred",
            _BOTH_ALLOCATORS,
            packages=(),
        ),
        Benchmark(
            "sparse-linear-0.01",
            "the same at 0.01% density",
            "peftkern.bench.sparse_linear:one_in_ten_thousand",
            _BOTH_ALLOCATORS,
            packages=(),
        ),
        Benchmark(
            "sparse-linear-5",
            "the same at 5% density",
            "peftkern.bench.sparse_linear:five_in_hundred",
            _BOTH_ALLOCATORS,
            packages=(),
        ),
        Benchmark(
            "step-smollm2",
            "a training step of SmolLM2-135M, NF4 double-quantized, LoRA r=16 on all linears, fp32",
            "peftkern.bench.step:cases",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "step-smollm2-bf16",
            "the same in bf16 on both sides: activations, adapter and compute",
            "peftkern.bench.step:bf16_cases",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "memory-smollm2",
            "peak resident memory of the step in fp32, each side in a fresh process",
            "peftkern.bench.memory:cases",
        ),
        Benchmark(
            "step-llama1b",
            "a training step of Llama-3.2-1B's shape, random weights, NF4, LoRA, 1 x 512, fp32; the peer checkpoints",
            "peftkern.bench.llama1b:step_cases",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "memory-llama1b",
            "peak resident memory of that step, each side in a fresh process",
            "peftkern.bench.llama1b:memory_cases",
        ),
        Benchmark(
            "step-8b",
            "peak resident memory of a training step of Llama-3-8B's shape, random NF4 weights, LoRA, 1 x 256, bf16",
            "peftkern.bench.llama8b:cases",
            packages=("peft",),
        ),
        Benchmark(
            "sparse-step",
            "time and memory of that step with sparse deltas, beside our own step with LoRA",
            "peftkern.bench.sparse_step:cases",
            packages=("peft",),
        ),
        Benchmark(
            "sparse-state",
            "gradients and optimizer state of sparse deltas, beside those of dense weights",
            "peftkern.bench.sparse_step:state_cases",
            packages=(),
        ),
        Benchmark(
            "hft-step",
            "a step of half fine-tuning of SmolLM2-135M, dense fp32, beside full fine-tuning by PyTorch",
            "peftkern.bench.half_step:cases",
            packages=(),
        ),
        Benchmark(
            "select-seconds",
            "a step of SmolLM2-135M, dense fp32, of what GreenTrainer chooses within a budget of seconds, beside all",
            "peftkern.bench.select_step:seconds_cases",
            packages=(),
        ),
        Benchmark(
            "select-flops",
            "the same within a budget of FLOPs: counted FLOPs and measured seconds",
            "peftkern.bench.select_step:flops_cases",
            packages=(),
        ),
        Benchmark(
            "select-memory",
            "peak resident memory of that step at half of the FLOPs, each side in a fresh process",
            "peftkern.bench.select_step:memory_cases",
            packages=(),
        ),
        Benchmark(
            "select-lora",
            "the same step with LoRA on NF4, choosing among adapters within a budget of seconds, beside all adapters",
            "peftkern.bench.select_step:lora_cases",
            packages=("peft",),
        ),
        Benchmark(
            "select-overhead",
            "what choosing takes, in full steps, and the solver's seconds",
            "peftkern.bench.select_step:overhead_cases",
            packages=(),
        ),
        Benchmark(
            "select-loss",
            "held-out loss of SmolLM2-135M on docstrings at half of the FLOPs of a step, beside full fine-tuning",
            "peftkern.bench.select_loss:loss_cases",
            packages=(),
        ),
        Benchmark(
            "select-vs-random",
            "the same loss in as many seconds, beside random selections and the published way to choose; five seeds",
            "peftkern.bench.select_loss:rival_cases",
            packages=(),
        ),
        Benchmark(
            "select-prediction",
            "predicted cost of the backward pass of random selections of SmolLM2-135M, in FLOPs and in seconds",
            "peftkern.bench.select_prediction:cases",
            packages=(),
        ),
        Benchmark(
            "select-solver",
            "seconds that the exact selector takes for 10,000 tensors; importance of the published selector beside it",
            "peftkern.bench.select_solver:cases",
            packages=(),
        ),
        Benchmark(
            "quantize",
            "NF4 quantize and dequantize of a 4096x4096 weight",
            "peftkern.bench.quantize:cases",
            _BOTH_ALLOCATORS,
        ),
        Benchmark(
            "adamw",
            "a step of AdamW on 8M fp32 entries beside PyTorch's fused one, and with 8-bit moments beside bitsandbytes",
            "peftkern.bench.optimizer:cases",
            packages=("bitsandbytes",),
        ),
        Benchmark(
            "select-top",
            "the largest 0.5% of 100M values in 200 tensors, beside torch.topk of all of them together",
            "peftkern.bench.select_top:cases",
            packages=(),
        ),
        Benchmark(
            "loss-ignored",
            "the loss tail of SmolLM2-135M's shape with 75% of the tokens ignored, beside all tokens",
            "peftkern.bench.loss_tail:cases",
            packages=(),
        ),
        Benchmark(
            "attention-smollm2",
            "causal attention, forward and backward, of SmolLM2-135M's shape and of 2048 tokens, beside PyTorch's",
            "peftkern.bench.attention:cases",
            packages=(),
        ),
        Benchmark(
            "packing-smollm2",
            "training steps of SmolLM2-135M on examples of different lengths, packed in one row beside padded",
            "peftkern.bench.packing:cases",
            packages=("peft",),
        ),
        Benchmark(
            "loss-parity",
            "the loss over 20 seeded training steps of SmolLM2-135M, fp32 at precision 'highest'",
            "peftkern.bench.loss:cases",
        ),
        Benchmark(
            "layer-plans",
            "peak memory and step time of SmolLM2-135M's shape under plans by layer, beside layers that store",
            "peftkern.bench.layer_plans:cases",
            packages=("peft",),
        ),
        Benchmark(
            "plan-accuracy",
            "predicted peak memory of training SmolLM2-135M, before it is loaded, beside the measured one",
            "peftkern.bench.plan_accuracy:cases",
            packages=("peft",),
        ),
        Benchmark(
            "aot-spills",
            "spilled registers and local memory of every GPU kernel on every architecture, compiled without a GPU",
            "peftkern.bench.aot.cases:spills",
            packages=("triton",),
        ),
        Benchmark(
            "aot-instructions",
            "instructions per weight of the NF4 product on GPUs, and the width of its loads, counted in machine code",
            "peftkern.bench.aot.cases:instructions",
            packages=("triton",),
        ),
        Benchmark(
            "aot-tensorcore",
            "tensor-core instructions of the NF4 product on every GPU architecture",
            "peftkern.bench.aot.cases:tensor_core",
            packages=("triton",),
        ),
        Benchmark(
            "traffic-launches",
            "launches of the 7 LoRA linears of a Llama-3-8B layer, NF4, r=16, bf16, forward and backward, counted",
            "peftkern.bench.traffic.cases:launches",
            packages=_COUNTED,
        ),
        Benchmark(
            "traffic-bytes",
            "bytes that they move at 2048 tokens",
            "peftkern.bench.traffic.cases:moved_bytes",
            packages=_COUNTED,
        ),
        Benchmark(
            "traffic-step",
            "launches of a whole layer and bytes of all 32, norms, rotary embedding and attention included",
            "peftkern.bench.traffic.cases:whole_step",
            packages=_COUNTED,
        ),
        Benchmark(
            "traffic-saved",
            "memory that they keep for the backward pass",
            "peftkern.bench.traffic.cases:saved",
            packages=_COUNTED,
        ),
        Benchmark(
            "traffic-saved-layer",
            "memory that they keep per token with the SwiGLU between them, and the whole layer, recomputing or not",
            "peftkern.bench.traffic.cases:saved_by_layer",
            packages=_COUNTED,
        ),
        Benchmark(
            "gpu-numerics",
            "worst relative error against float64 of GPU kernels, executed and emulated without a GPU",
            "peftkern.gpu_check.executed:cases",
            packages=("triton",),
        ),
    )
}


ALIASES = {"step-smollm2-highest": "step-smollm2"}
"""Second names of benchmarks."""


def find(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, in this order, each once; all of them for an empty list.

    Raises:
        BenchError: a name is unknown; the message lists the known ones.
    """
    if not names:
        return list(BENCHMARKS.values())
    names = [ALIASES.get(name, name) for name in names]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise BenchError(_describe_unknown(unknown))
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def _describe_unknown(unknown: Sequence[str]) -> str:
    close = difflib.get_close_matches(unknown[0], BENCHMARKS, n=1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    quoted = ", ".join(repr(name) for name in unknown)
    return f"NAME: unknown benchmark {quoted}{guess}; known are: {', '.join(BENCHMARKS)}"


def require_packages(benchmarks: Sequence[Benchmark]) -> None:
    """Raise :class:`BenchError` unless every package that they need is installed; the message says how to."""
    wanted = dict.fromkeys(package for benchmark in benchmarks for package in benchmark.packages)
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        raise BenchError(
            f"these benchmarks need {', '.join(missing)} beside peftkern, which is not installed; "
            f"install it with: pip install 'peftkern[bench]'"
        )
