"""A training step of SmolLM2-135M with sparse deltas on an NF4 base, beside our own step with LoRA r=16.

Both are patched and take the same batch; a step is forward, loss, backward and AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peftkern.bench import memory, peers, smollm2
from peftkern.bench.case import Case, Effort, Measurement
from peftkern.bench.errors import DisagreementError
from peftkern.bench.result import Quantity
from peftkern.bench.step import EFFORT, TOLERANCE

DENSITIES = (0.001, 0.005, 0.01, 0.05)

BYTES_PER_ENTRY = {"gradients": 4, "optimizer state": 8}
"""One float32 gradient and two float32 moments for each entry that is trained."""


def setup_step(
    checkpoint: smollm2.Checkpoint, batch: int = smollm2.BATCH, length: int = smollm2.LENGTH, effort: Effort = EFFORT
) -> Case:
    """One step of each on the same batch; the peer is LoRA. The sparse one is checked against the reference."""
    lora, sparse = smollm2.LOOPS["ours"](checkpoint.folder), smollm2.LOOPS["sparse"](checkpoint.folder)
    (ids,) = smollm2.make_batches(checkpoint.folder, 1, batch, length)
    generator = torch.Generator().manual_seed(1)
    peers.fill_lora_b(lora.model, generator)
    with torch.no_grad():
        for values in peers.trainable(sparse.model).values():
            values.copy_(1e-3 * torch.randn(values.shape, generator=generator))

    def check() -> None:
        loss, gradients = sparse.loss_and_gradients(ids)
        with peers.on_reference():
            expected_loss, expected = sparse.loss_and_gradients(ids)
        pairs = {f"gradient of {name}": (gradients[name], expected[name]) for name in expected}
        peers.check_agreement({"loss": (loss, expected_loss), **pairs}, TOLERANCE)

    text = f"sparse deltas {smollm2.SPARSE_DENSITY:.1%} | LoRA r={peers.RANK}, batch {batch} x {length}"
    text = f"{text}, {checkpoint.note}" if checkpoint.note else text
    return Case(text, lambda: sparse.step(ids), lambda: lora.step(ids), check, unit="s", effort=effort)


def cases() -> Iterator[Case | Measurement]:
    """Time and memory of ``sparse-step``."""
    with smollm2.checkpoint() as checkpoint:
        yield setup_step(checkpoint)
        yield from memory.measure_memory(checkpoint, "freed memory returned", ours="sparse", peer="ours")


def measure_state(
    checkpoint: smollm2.Checkpoint, densities: tuple[float, ...] = DENSITIES, batch: int = 1, length: int = 16
) -> Iterator[Measurement]:
    """Bytes of gradients and of optimizer state after a step, by density; the peer trains the dense weights.

    Raises:
        DisagreementError: they are not proportional to the trained entries.
    """
    (ids,) = smollm2.make_batches(checkpoint.folder, 1, batch, length)
    dense = _bytes_after_step(_dense_linears(checkpoint.folder), ids)
    for density in densities:
        loop = smollm2.Loop(smollm2.load_sparse(checkpoint.folder, density))
        entries = sum(values.numel() for values in peers.trainable(loop.model).values())
        measured = _bytes_after_step(loop, ids)
        for what, expected in BYTES_PER_ENTRY.items():
            if measured[what] != expected * entries:
                raise DisagreementError(
                    f"{what} of {entries} entries: {measured[what]} bytes, and {expected} bytes each are proportional"
                )
            text = f"{what}, {entries:,} entries ({density:.1%} of the linear weights) | all of them"
            yield Measurement(text, "MB", Quantity.MEMORY, [measured[what] / 1e6], [dense[what] / 1e6])


def _dense_linears(folder: str) -> smollm2.Loop:
    from peftkern import sparse

    model = smollm2.load_dense(folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in sparse.linear_layers(model).values():
        layer.get_parameter("weight").requires_grad_(True)
    return smollm2.Loop(model)


def _bytes_after_step(loop: smollm2.Loop, ids: torch.Tensor) -> dict[str, int]:
    loop.step(ids)
    return loop.training_bytes()


def state_cases() -> Iterator[Measurement]:
    """Measurements of ``sparse-state``."""
    with smollm2.checkpoint() as checkpoint:
        yield from measure_state(checkpoint)
