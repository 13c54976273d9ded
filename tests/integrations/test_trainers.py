"""Trainers of others train a patched 4-bit model with LoRA as they train it unpatched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import pytest
import torch
import trl
from tiny_models import make_llama
from tiny_tokenizer import make_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftkern

VOCABULARY = 320
EXACT = 1e-5


def quantized(layers: int = 2) -> Any:
    model = make_llama(vocab_size=VOCABULARY, num_hidden_layers=layers).train()
    peftkern.quantize_(model, peftkern.QuantConfig("nf4"))
    return model


def lora_config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def qlora(dropout: float = 0.0, layers: int = 2) -> Any:
    """The same weights every time; the adapters are random, B included."""
    model = quantized(layers)
    torch.manual_seed(2)
    return peft.get_peft_model(model, lora_config(init_lora_weights=False, lora_dropout=dropout))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_parameters(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm(), name


def token_rows(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    return kind(str(folder), **{**settings, **options})


def history(trainer: Any, *keys: str) -> list[list[float]]:
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if keys[0] in entry]


# ---- transformers


def test_a_trainer_accumulates_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """With dropout, so that random numbers have to go on where they were."""

    def run(folder: Path, checkpoint: Path | None = None) -> tuple[Any, dict[str, Tensor]]:
        model = qlora(dropout=0.2)
        peftkern.patch(model, strict=True, logits=False)
        options = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = Trainer(model, options, train_dataset=token_rows(16))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return history(trainer, "loss", "grad_norm"), trained(model)

    losses, expected = run(tmp_path / "whole")
    again, actual = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")
    assert len(losses) == 4 and again == losses
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    results = []
    for size, steps in ((4, 1), (1, 4)):
        model = qlora()
        peftkern.patch(model, strict=True)
        options = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer = Trainer(model, options, train_dataset=token_rows())
        trainer.train()
        results.append((history(trainer, "loss"), trained(model)))
    assert results[1][0] == [pytest.approx(losses, rel=EXACT) for losses in results[0][0]]
    assert_same_parameters(results[1][1], results[0][1], 1e-4)


# ---- accelerate


def test_accelerate_trains_and_loads_its_state(tmp_path: Path) -> None:
    def loop(patched: bool) -> tuple[list[float], dict[str, Tensor]]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = qlora()
        if patched:
            peftkern.patch(model, strict=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loader = torch.utils.data.DataLoader(token_rows(), batch_size=2)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for step, batch in enumerate(loader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if step == 1:
                accelerator.save_state(str(tmp_path / str(patched)))
                saved = trained(model)
        final = trained(model)
        accelerator.load_state(str(tmp_path / str(patched)))
        assert all(torch.equal(value, saved[name]) for name, value in trained(model).items())
        return losses, final

    (losses, parameters), (expected, expected_parameters) = loop(True), loop(False)
    assert losses == pytest.approx(expected, rel=EXACT)
    assert_same_parameters(parameters, expected_parameters, 1e-4)


# ---- trl


def text_rows(*columns: str) -> Any:
    texts = ["the answer", "to the question", "is", "the number of the things", "a thing", "answers are numbers"]
    rows = [{name: f" {texts[(i * 2 + k) % 6]}" for k, name in enumerate(columns)} for i in range(4)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("logits", [True, False])
def test_sft_trainer(tmp_path: Path, logits: bool) -> None:
    def run(patched: bool) -> tuple[Any, dict[str, Tensor]]:
        model = qlora()
        if patched:
            peftkern.patch(model, strict=True, logits=logits)
        options = arguments(tmp_path, trl.SFTConfig, max_length=32)
        rows = text_rows("prompt", "completion")
        trainer = trl.SFTTrainer(model, options, train_dataset=rows, processing_class=padded_tokenizer())
        trainer.train()
        assert_all_calls_fused(model, patched)
        return history(trainer, "loss", "mean_token_accuracy"), trained(model)

    assert_same_training(run(True), run(False))


@pytest.mark.parametrize("reference", ["adapters off", "a copy of the adapter"])
def test_dpo_trainer(tmp_path: Path, reference: str) -> None:
    """Where it adds the adapters itself it switches them off for the reference; an adapter that is there it copies."""

    def run(patched: bool) -> tuple[Any, dict[str, Tensor]]:
        options = arguments(tmp_path, trl.DPOConfig, max_length=32, beta=0.5)
        data = {"train_dataset": text_rows("prompt", "chosen", "rejected"), "processing_class": padded_tokenizer()}
        if reference == "adapters off":
            trainer = trl.DPOTrainer(quantized(), args=options, peft_config=lora_config(), **data)
        else:
            trainer = trl.DPOTrainer(qlora(), args=options, **data)
        assert trainer.ref_model is None
        assert list(trainer.model.peft_config) == ["default", "ref"][: 1 if reference == "adapters off" else 2]
        if patched:
            peftkern.patch(trainer.model, strict=True)
        trainer.train()
        assert_all_calls_fused(trainer.model, patched)
        return history(trainer, "loss", "rewards/chosen", "rewards/rejected", "logps/chosen"), trained(trainer.model)

    ours, theirs = run(True), run(False)
    assert_same_training(ours, theirs)
    # at first the policy is the reference
    assert [round(row[1], 3) == 0 for row in ours[0]] == [True, False]


def padded_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    return tokenizer


def assert_all_calls_fused(model: Any, patched: bool) -> None:
    fused = [module for module in model.modules() if "_peftkern" in module.__dict__]
    assert bool(fused) == patched
    assert not any(module.__dict__["_peftkern"].calls_left for module in fused)


def assert_same_training(actual: Any, expected: Any) -> None:
    assert len(expected[0]) == 2
    assert actual[0] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected[0]]
    assert_same_parameters(actual[1], expected[1], 1e-4)


# ---- torch.compile


def test_a_compiled_patched_model_computes_the_same() -> None:
    model = qlora(layers=1)
    peftkern.patch(model, strict=True)
    batch = {name: value[None] for name, value in token_rows()[0].items()}

    def run(callable_: Any) -> tuple[float, dict[str, Tensor]]:
        loss = callable_(**batch).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.item(), gradients

    expected_loss, expected = run(model)
    loss, gradients = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    assert loss == pytest.approx(expected_loss, rel=EXACT)
    assert_same_parameters(gradients, expected, 1e-4)
