"""Importance in two processes: both have the same, the mean of theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from select_models import batches, llama
from torch.nn.parallel import DistributedDataParallel

from peftkern.optim import AdamW
from peftkern.select.probe import probe


def _worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    model = llama()
    names = [name for name, _ in model.named_parameters()]
    optimizer = AdamW(model.parameters(), lr=1e-2)
    both = [probe(model, batch, names, optimizer) for batch in batches(2)]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        replicated = DistributedDataParallel(model)
        for _ in range(2):  # before and after a step that reduces gradients
            found = probe(replicated, batches(2)[rank], names, optimizer)
            assert all(p.grad is None for p in model.parameters())
            theirs: list[dict[str, float] | None] = [None, None]
            dist.all_gather_object(theirs, found)
            assert theirs[0] == theirs[1] == found
            if optimizer.state:
                break
            assert found == {name: (both[0][name] + both[1][name]) / 2 for name in names}
            replicated(**batches(2)[rank]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        replicated(**batches(2)[rank]).loss.backward()
        reduced = model.model.norm.weight.grad
        assert reduced is not None
        other = reduced.clone()
        dist.broadcast(other, 0)
        assert torch.equal(reduced, other)  # the probe has not disturbed the reduction
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # workers are fresh interpreters, which do not inherit pytest's import path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "rendezvous"),), nprocs=2)
