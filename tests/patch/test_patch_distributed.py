"""Patched models in two processes: DDP, and FSDP2 with packed weights sharded beside float ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from patch_models import DEEP, error, fused_modules, llama, lora, run, text
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peftkern.patch import patch


def _worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    model = lora(llama("nf4"))
    expected_logits, expected = run(model, text())
    patch(model, strict=True)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        replicated = DistributedDataParallel(model)
        replicated(**text()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or error(parameter.grad, expected[name]) <= DEEP, name
        model.zero_grad()

        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        output = model(**text())
        output.loss.backward()
        assert error(output.logits.detach(), expected_logits) <= DEEP
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        assert all(error(gradient, expected[name]) <= DEEP for name, gradient in gradients.items())
        assert not any(module.__dict__["_peftkern"].calls_left for module in fused_modules(model).values())
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # workers are fresh interpreters, which do not inherit pytest's import path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "rendezvous"),), nprocs=2)
