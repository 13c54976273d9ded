"""A policy in two processes under DistributedDataParallel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from round_robin import RoundRobin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftkern.optim import AdamW


@dataclass
class Output:
    """DistributedDataParallel finds tensors in dataclasses, lists and dictionaries only."""

    loss: Tensor


class Tower(nn.Module):
    """Four layers; fresh processes import it faster than a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Output:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return Output((x - 1).square().mean())


class OfEachItsOwn(RoundRobin):
    """The selection of every process is another."""

    def select(self) -> Any:
        self._turn += dist.get_rank() if dist.is_initialized() else 0
        return super().select()


def train(rows: slice, replicate: bool) -> dict[str, Tensor]:
    model = Tower()
    policy = OfEachItsOwn([f"layers.{layer}" for layer in (2, 0, 3, 1)], 1)
    policy.prepare(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if replicate else model
    optimizer = AdamW(policy.parameters(), lr=0.01, weight_decay=0.1)
    policy.start(optimizer)
    data = torch.randn(6, 2, 6, generator=torch.Generator().manual_seed(2))
    losses = [policy.step(wrapped, {"x": batch[rows]}) for batch in data]
    return {**{name: p.detach().clone() for name, p in model.named_parameters()}, "losses": torch.stack(losses)}


def refuse_to_wait_for_all() -> None:
    model = Tower()
    wrapped = DistributedDataParallel(model)
    policy = RoundRobin(["layers.1"])
    policy.prepare(model)
    policy.start(AdamW(policy.parameters()))
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        policy.step(wrapped, {"x": torch.randn(1, 6)})


def work(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    expected = train(slice(None), replicate=False)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        actual = train(slice(rank, rank + 1), replicate=True)
        dist.all_reduce(actual["losses"])
        actual["losses"] /= 2
        for name, value in expected.items():
            assert torch.allclose(actual[name], value, atol=1e-6), name
        refuse_to_wait_for_all()
        # otherwise a thread of gloo may want Python's lock while the end of the group, which holds it, waits for that
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes_train_what_the_first_one_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # workers are fresh interpreters, which do not inherit pytest's import path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    torch.multiprocessing.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=2)
