"""Packed rows: the loss of every token, and every gradient, are those of padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import FAMILIES, VOCABULARY
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftkern

LENGTHS = (5, 1, 9, 3, 7)
APART = [name for name in FAMILIES if name not in ("opt", "bloom", "bert", "roberta", "t5", "vit")]
"""Families whose models keep examples of a row apart."""
EXACT = 1e-5


def examples(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    """Of several lengths; the first third of the labels of each is ignored, but for short ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in rows]


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[int(i < len(row["input_ids"])) for i in range(longest)] for row in rows])
    return {"input_ids": stack("input_ids", 0), "labels": stack("labels", -100), "attention_mask": mask}


def losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Of every token that has a label, in the order of the examples."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    found = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return found[labels != -100]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert (actual - expected).norm() <= EXACT * expected.norm(), what


def test_what_a_batch_is() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": torch.tensor([8, 9])}]
    batch = peftkern.PackingCollator()(rows)
    assert batch.pop("use_cache") is False
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, -100, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }


def test_padding_is_left_out_and_lengths_must_fit() -> None:
    collate = peftkern.PackingCollator()
    padded, plain = {"input_ids": [3, 4, 0, 0], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [3, 4]}
    assert torch.equal(collate([padded])["input_ids"], collate([plain])["input_ids"])
    with pytest.raises(ValueError, match="3 input_ids, 2 labels and 3 numbers"):
        collate([{"input_ids": [3, 4, 5], "labels": [3, 4]}])
    with pytest.raises(ValueError, match="empty"):
        collate([{"input_ids": []}])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "by example"])
@pytest.mark.parametrize("name", APART)
def test_losses_and_gradients_are_those_of_a_padded_batch(name: str, attention: str) -> None:
    if name == "gemma2" and attention != "eager":
        pytest.skip("transformers has no such attention for it")
    config = {"attn_implementation": "eager" if attention == "eager" else "sdpa"}
    model = FAMILIES[name].with_lora("nf4", config=config)
    assert attention != "by example" or peftkern.attend_by_example(model)
    peftkern.patch(model, logits=False)
    packed, padded = peftkern.PackingCollator()(examples()), pad(examples())
    expected = losses(model, padded)
    assert_close(losses(model, packed), expected)
    # of the model's own loss, without logits where it has one
    assert_close(model(**packed).loss, expected.mean())
    theirs = gradients(model, expected.mean())
    for name, gradient in gradients(model, model(**packed).loss).items():
        assert_close(gradient, theirs[name], name)


def test_attention_by_example_computes_no_pairs_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build("dense")
    seen: list[int] = []  # tokens that are attended to
    real = nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(key.shape[2])
        return real(query, key, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    assert peftkern.attend_by_example(model) and peftkern.attend_by_example(model)
    model(**peftkern.PackingCollator()(examples()))
    assert seen == 2 * list(LENGTHS)
    seen.clear()
    padded = pad(examples())
    model(**padded)  # rows of a padded batch are left alone
    assert seen == 2 * [max(LENGTHS)]
    model.set_attn_implementation("sdpa")
    eager = FAMILIES["gemma2"].build("dense")
    assert not peftkern.attend_by_example(eager) and eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_models_that_do_not_keep_examples_apart_are_refused(name: str) -> None:
    model = FAMILIES[name].build("dense")
    with pytest.raises(ValueError, match="cannot be trained on packed rows"):
        peftkern.check_packing(model)
    assert model.training


def test_the_check_passes_and_changes_nothing() -> None:
    model = FAMILIES["llama"].with_lora("nf4", lora_dropout=0.5)
    peftkern.patch(model)
    frozen = model.base_model.model.model.layers[0]
    frozen.eval()
    state = torch.get_rng_state()
    peftkern.check_packing(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not frozen.training and not frozen.mlp.training
    assert all(p.grad is None for p in model.parameters())


def test_a_trainer_packs_as_it_pads(tmp_path: Path) -> None:
    """It counts labels over the batches of a step: with accumulation every token keeps its weight."""

    def train(collate: Any) -> tuple[list[float], dict[str, Tensor]]:
        model = FAMILIES["llama"].with_lora("nf4")
        peftkern.patch(model, strict=True, logits=False)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = examples(1, (5, 8, 9, 3, 7, 4, 12, 6))
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return found, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    (packed, parameters), (padded, expected) = train(peftkern.PackingCollator()), train(pad)
    assert len(packed) == 3 and packed == pytest.approx(padded, rel=EXACT)
    for name, parameter in parameters.items():
        assert (parameter - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
