"""A training step of Llama-3.2-1B's shape with random weights: where the vocabulary is a quarter of the model.

NF4 with double quantization, LoRA r=16 on all linears, float32, one row of 512 tokens. The peer runs with gradient
checkpointing; ours computes its loss without logits, and so has the memory for a plan by layer that makes less again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from peftkern.bench import memory, smollm2
from peftkern.bench.case import Case, Effort, Measurement
from peftkern.bench.step import setup_step

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_theta": 500000.0,
}
BATCH, LENGTH = 1, 512
EFFORT = Effort(minimum_pairs=3, maximum_pairs=5, seconds=60.0)
PAIRS = 1
"""A run takes minutes, and memory differs little from one to the next."""
OURS, PEER = "ours planned", "peer checkpointed"


@contextmanager
def checkpoint() -> Iterator[smollm2.Checkpoint]:
    """Random weights of this shape on disk: 5 GB for as long as the with block lasts."""
    with tempfile.TemporaryDirectory(prefix="peftkern-bench-") as folder:
        smollm2.save_random(folder, **SHAPE)
        yield smollm2.Checkpoint(folder, "random weights")


def step_cases() -> Iterator[Case]:
    """Cases of ``step-llama1b``."""
    with checkpoint() as saved:
        yield setup_step(saved, BATCH, LENGTH, EFFORT, OURS, PEER)


def memory_cases() -> Iterator[Measurement]:
    """Measurements of ``memory-llama1b``."""
    with checkpoint() as saved:
        for setting in memory.SETTINGS:
            yield from memory.measure_memory(
                saved, setting, pairs=PAIRS, batch=BATCH, length=LENGTH, ours=OURS, peer=PEER
            )
