"""A QLoRA training step on a GPU, ours beside PEFT + bitsandbytes: a Llama with random weights, NF4, bfloat16.

    PYTHONPATH=. python benchmarks/gpu_step.py [--layers 8 --hidden 2048 --intermediate 8192] [--json FILE]

Both sides get the same weights, adapters (r=16 on all linears, float32 as PEFT makes them) and batches, and their
losses over three steps have to agree. A step is forward, loss, backward and AdamW. It is timed twice: as Python runs
it, where the host is often what takes the time, and captured once as a CUDA graph and replayed: the GPU's time alone.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import peftkern
from peftkern.bench import peers
from peftkern.nn import QuantizedLinear

STEPS = 10
TOLERANCE = 2e-3
"""Relative, of losses: bfloat16 activations are rounded at other places."""


@dataclass(frozen=True)
class Result:
    """Milliseconds of a step, run and replayed, and the peak of memory in MB while it was run."""

    side: str
    batch: int
    length: int
    step: float
    replayed: float | None
    peak: float


def random_model(config: Any, device: str) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    return model


def with_linears(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """``model`` with other layers for its linear ones, the head excepted."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not model.lm_head:
                setattr(parent, name, make(child))
    return model


def ours(config: Any, device: str) -> Any:
    model = with_linears(random_model(config, device), lambda linear: QuantizedLinear.from_linear(linear, "nf4"))
    adapted = with_adapters(model, device)
    peftkern.patch(adapted, strict=True)
    return adapted


def peer(config: Any, device: str) -> Any:
    model = with_linears(
        random_model(config, device), lambda linear: peers.peer_linear(linear.weight.detach(), torch.bfloat16).linear
    )
    model.is_loaded_in_4bit = True  # the name under which PEFT looks for what from_pretrained notes down
    return with_adapters(model, device)


def with_adapters(model: Any, device: str) -> Any:
    torch.manual_seed(1)
    adapted = peers.with_adapter(model, "all-linear", torch.float32)
    peers.fill_lora_b(adapted, torch.Generator().manual_seed(5))
    return adapted.to(device)


def adamw(model: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(peers.trainable(model).values()), lr=1e-3, **options)


def step(model: Any, optimizer: torch.optim.AdamW, ids: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def milliseconds(call: Callable[[], object]) -> float:
    """Median of :data:`STEPS` calls, each waited for."""
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def captured(model: Any, ids: Tensor) -> Callable[[], object]:
    """A step as a CUDA graph."""
    optimizer = adamw(model, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer, ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer, ids)
    return graph.replay


def measure(side: str, model: Any, batch: int, length: int, ids: Tensor) -> Result:
    optimizer = adamw(model)
    for _ in range(3):
        step(model, optimizer, ids)
    torch.cuda.reset_peak_memory_stats()
    taken = milliseconds(lambda: step(model, optimizer, ids))
    peak = torch.cuda.max_memory_allocated() / 1e6
    return Result(side, batch, length, taken, milliseconds(captured(model, ids)), peak)


def run_side(
    side: str, build: Callable[[Any, str], Any], config: Any, device: str, shapes: Sequence[tuple[int, int]]
) -> tuple[list[float], list[Result]]:
    """The losses of three steps, and what was timed."""
    model = build(config, device)
    optimizer = adamw(model)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(config.vocab_size, shape, generator=generator).to(device) for shape in shapes]
    losses = [float(step(model, optimizer, batches[0])) for _ in range(3)]
    if device == "cpu":
        return losses, []
    return losses, [measure(side, model, *shape, ids) for shape, ids in zip(shapes, batches, strict=True)]


def main(
    layers: int = 8,
    hidden: int = 2048,
    intermediate: int = 8192,
    heads: int = 16,
    key_value_heads: int = 8,
    vocabulary: int = 32000,
    shape: Annotated[list[str], typer.Option(help="BATCHxLENGTH, as often as wanted.")] = ["4x512", "8x1024"],  # noqa: B006
    device: str = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time both sides, one after the other; on the CPU only compare their losses."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )
    shapes = [(int(batch), int(length)) for batch, length in (text.split("x") for text in shape)]
    losses, results = {}, []
    for side, build in (("ours", ours), ("PEFT + bitsandbytes", peer)):
        losses[side], found = run_side(side, build, config, device, shapes)
        results += found
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    typer.echo(f"losses: {losses}")
    for one in results:
        typer.echo(
            f"{one.side}, {one.batch} x {one.length}: {one.step:.1f} ms, replayed {one.replayed:.1f} ms, "
            f"peak {one.peak:.0f} MB"
        )
    if json_file is not None:
        json_file.write_text(json.dumps({"losses": losses, "results": [asdict(one) for one in results]}, indent=1))
    first, second = losses.values()
    if any(abs(a - b) > TOLERANCE * abs(b) for a, b in zip(first, second, strict=True)):
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    typer.run(main)
