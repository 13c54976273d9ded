"""DPO and ORPO without logits: the losses, gradients and rewards of trl's trainers."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from model_families import FAMILIES, VOCABULARY
from tiny_tokenizer import make_tokenizer
from torch import Tensor, nn
from trl.experimental.orpo import ORPOTrainer

import peftkern

EXACT = 1e-5


def pairs(rows: int = 4, tokens: int = 9) -> dict[str, Tensor]:
    """Prompts of three tokens, answers of different lengths."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = -100
    for row in range(rows):
        end = tokens - row
        ids[row, end:], labels[row, end:], mask[row, end:] = 0, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def qlora(name: str = "llama", patched: bool = True, **options: Any) -> Any:
    model = FAMILIES[name].with_lora("nf4", **options)
    if patched:
        peftkern.patch(model, strict=True, logits=False)
    return model


def logprobs_of_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1].float(), batch["labels"][:, 1:]
    found = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return found * (labels != -100)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "quantized": {},
    "quantized, LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "trained in full": {"modules_to_save": ["lm_head"]},
}


def with_head(head: str, patched: bool = True) -> Any:
    base = FAMILIES["llama"].build("nf4")
    if "quantized" in head:
        base.lm_head = peftkern.QuantizedLinear.from_linear(base.lm_head, "int8")
    settings: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False, **HEADS[head]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    if patched:
        peftkern.patch(model, logits=False)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_every_kind(head: str) -> None:
    model, other, batch = with_head(head), with_head(head, patched=False), pairs()
    for each in (model, other):
        found, expected = peftkern.token_logprobs(each, batch), logprobs_of_logits(each, batch)
        assert (found - expected).norm() <= EXACT * expected.norm()
        assert_same_gradients(gradients(each, found.sum()), gradients(each, expected.sum()))


@pytest.mark.parametrize("head", ["LoRA", "quantized, LoRA", "trained in full"])
def test_the_reference_has_the_head_of_the_base_alone(head: str) -> None:
    model, batch = with_head(head), pairs()
    with torch.no_grad(), model.disable_adapter():
        reference = logprobs_of_logits(model, batch).sum(1)
    own, given = peftkern.dpo_loss(model, batch), peftkern.dpo_loss(model, batch, reference_logprobs=reference)
    assert own.loss.item() == pytest.approx(given.loss.item(), rel=EXACT)
    if "LoRA" in head:
        assert (peftkern.token_logprobs(model, batch).sum(1) - reference).norm() > 1e-3


def test_merged_adapters_of_a_head_are_not_in_the_reference() -> None:
    model, batch = with_head("LoRA"), pairs()
    expected = peftkern.dpo_loss(model, batch).loss
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        reference = peftkern.token_logprobs(model, batch).sum(1)
    assert peftkern.dpo_loss(model, batch, reference_logprobs=reference).loss.item() == pytest.approx(
        expected.item(), rel=1e-3
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_logprobs_are_those_of_the_logits(name: str) -> None:
    model, batch = qlora(name), pairs()
    found, expected = peftkern.token_logprobs(model, batch), logprobs_of_logits(model, batch)
    assert found.shape == (4, 8) and found.dtype == torch.float32
    assert (found - expected).norm() <= EXACT * expected.norm()
    assert torch.equal(found == 0, batch["labels"][:, 1:] == -100)
    assert_same_gradients(gradients(model, found.sum()), gradients(model, expected.sum()))
    assert not model.get_base_model().get_submodule("lm_head")._forward_hooks


def test_the_loss_of_a_policy_that_is_its_reference() -> None:
    model, batch = qlora(init_lora_weights=True), pairs()
    result = peftkern.dpo_loss(model, batch)
    assert result.loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert not result.chosen_rewards.any() and not result.rejected_rewards.requires_grad


def test_adapters_off_are_the_model_without_them() -> None:
    model, batch = qlora(), pairs()
    base = FAMILIES["llama"].build("nf4")
    reference = peftkern.token_logprobs(base, batch).sum(1).detach()
    given, own = peftkern.dpo_loss(model, batch, 0.3, reference), peftkern.dpo_loss(model, batch, 0.3)
    assert given.loss.item() == pytest.approx(own.loss.item(), rel=EXACT)
    assert torch.allclose(given.chosen_rewards, own.chosen_rewards, rtol=1e-3)


def test_the_loss_of_trls_dpo_trainer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    texts = ["the answer", "to the question", "is", "the number of the things"]
    rows = [{"prompt": texts[i], "chosen": texts[i - 1], "rejected": texts[i - 2]} for i in range(4)]
    options = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.5, report_to=[])
    model = FAMILIES["llama"].build("nf4", vocab_size=len(tokenizer))
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    trainer = trl.DPOTrainer(
        model, args=options, train_dataset=Dataset.from_list(rows), peft_config=config, processing_class=tokenizer
    )
    policy = trainer.model.train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(policy, inputs)
    batch = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "labels": inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100),
    }
    result = peftkern.dpo_loss(policy, batch, beta=0.5)
    assert expected.item() != pytest.approx(math.log(2), rel=1e-3)
    assert result.loss.item() == pytest.approx(expected.item(), rel=EXACT)
    assert result.chosen_rewards.mean().item() == pytest.approx(
        trainer._metrics["train"]["rewards/chosen"][0], rel=1e-4
    )
    assert_same_gradients(gradients(policy, result.loss), gradients(policy, expected))


def test_the_odds_of_trls_orpo_trainer() -> None:
    model, batch = qlora(), pairs()
    result = peftkern.orpo_loss(model, batch, 0.3)
    logprobs, counts = logprobs_of_logits(model, batch), (batch["labels"][:, 1:] != -100).sum(1)
    trainer = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    odds, *rewards = ORPOTrainer.odds_ratio_loss(trainer, *(logprobs.sum(1) / counts).chunk(2))[:3]
    expected = -logprobs[:2].sum() / counts[:2].sum() - odds.mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=EXACT)
    assert torch.allclose(
        torch.stack([result.chosen_rewards, result.rejected_rewards]), torch.stack(rewards), rtol=1e-4
    )
    assert_same_gradients(gradients(model, result.loss), gradients(model, expected))


def test_what_cannot_be_done_is_named() -> None:
    model, batch = qlora(), pairs()
    odd = {name: value[:3] for name, value in batch.items()}
    with pytest.raises(ValueError, match="got 3 rows"):
        peftkern.dpo_loss(model, odd)
    with pytest.raises(ValueError, match=r"reference_logprobs must be \[4\], got \[2\]"):
        peftkern.dpo_loss(model, batch, reference_logprobs=torch.zeros(2))
    with pytest.raises(ValueError, match="no adapters of PEFT"):
        peftkern.dpo_loss(FAMILIES["llama"].build("dense"), batch)
    with pytest.raises(ValueError, match="no causal language model that is known"):
        peftkern.token_logprobs(FAMILIES["bloom"].build("dense"), batch)
    with pytest.raises(ValueError, match=r"needs its logits: its head: adapter 'default' is DoRA's"):
        peftkern.token_logprobs(qlora(target_modules=["lm_head"], use_dora=True), batch)
    batch["labels"][2] = -100
    with pytest.raises(ValueError, match=r"rows \[2\] have none"):
        peftkern.orpo_loss(model, batch)
