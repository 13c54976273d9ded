"""Patched 4-bit models with LoRA in two processes train as in one: DDP, FSDP2, DPO, Trainer, each rank on its rows."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patch_models import DEEP, error, fused_modules, llama, lora, text
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.patch import patch

STEPS = 3


def rows_of(step: int, rank: int | None) -> dict[str, Tensor]:
    """The rows of one process, or of all; every row has as many tokens."""
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return {name: value[rows] for name, value in text(4, seed=step).items()}


def train(model: nn.Module, rank: int | None) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, averaged over processes, and the adapters at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = model(**rows_of(step, rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / (1 if rank is None else dist.get_world_size())
        if rank is not None:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def preference_gradients(model: nn.Module, rank: int | None) -> dict[str, Tensor]:
    """Of DPO over two pairs, or over the one of this process."""
    rows = slice(None) if rank is None else slice(rank, None, 2)
    peftkern.dpo_loss(model, {name: value[rows] for name, value in text(4, seed=9).items()}).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_with_trainer(model: Any, folder: str, rows: int) -> tuple[list[float], dict[str, Tensor]]:
    data = [{name: value[i] for name, value in text(4, seed=step).items()} for step in range(STEPS) for i in range(4)]
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    assert len(expected[0]) == STEPS and expected[0][0] != expected[0][-1]
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert_same_tensors(actual[1], expected[1])


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    actual = {name.removeprefix("module."): value for name, value in actual.items()}
    assert actual.keys() == expected.keys() and actual
    assert all(error(actual[name], value) <= DEEP for name, value in expected.items())


def _worker(rank: int, folder: str, in_one_process: Any, with_one_trainer: Any, preferences: Any) -> None:
    torch.set_num_threads(1)
    model = lora(llama("nf4"))
    patch(model, strict=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        assert_same(train(DistributedDataParallel(copy.deepcopy(model)), rank), in_one_process)
        assert_same_tensors(preference_gradients(DistributedDataParallel(copy.deepcopy(model)), rank), preferences)
        assert_same(train_with_trainer(copy.deepcopy(model), folder, 2), with_one_trainer)

        sharded = copy.deepcopy(model)
        for layer in sharded.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        assert_same(train(sharded, rank), in_one_process)
        assert not any(module.__dict__["_peftkern"].calls_left for module in fused_modules(sharded).values())
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # workers are fresh interpreters, which do not inherit pytest's import path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    model = lora(llama("nf4"))
    preferences = preference_gradients(model, None)
    model.zero_grad()
    expected = train(model, None), train_with_trainer(lora(llama("nf4")), str(tmp_path), 4), preferences
    torch.multiprocessing.spawn(_worker, (str(tmp_path), *expected), nprocs=2)
