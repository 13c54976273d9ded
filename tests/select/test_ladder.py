"""Taps on a frozen model: nothing flows back, and fusion is what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saved_bytes import saved_by_forward, saved_inside
from select_models import build, changed, llama, values
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import peftkern
from peftkern.select.ladder import LadderClassifier, pool


def deep(**changes: Any) -> Any:
    return llama(num_hidden_layers=8, **changes)


def ladder(backbone: Any = None, classes: int = 3, **options: Any) -> LadderClassifier:
    torch.manual_seed(7)
    return LadderClassifier(deep() if backbone is None else backbone, classes, **{"width": 16, **options})


def batch(rows: int = 4, tokens: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 3}


class Side(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


@pytest.mark.parametrize("fusion", ["sum", "softmax", "concat"])
@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_is_kept_in_the_frozen_model_and_nothing_of_it_moves(fusion: str, quantized: bool) -> None:
    backbone = deep(hidden_size=64, intermediate_size=64)
    if quantized:
        peftkern.quantize_(backbone, peftkern.QuantConfig("nf4"))
    model = ladder(backbone, fusion=fusion)
    before = values(model)
    with saved_inside(model.backbone) as inside:
        loss = model(**batch()).loss
    assert inside.bytes == 0
    loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    optimizer = peftkern.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    optimizer.step()
    assert changed(model, before) <= trained
    assert {name for name in changed(model, before) if name.startswith("backbone")} == set()


def test_what_is_kept_does_not_grow_with_the_tokens() -> None:
    model = ladder()
    kept = []
    for tokens in (6, 24):
        with saved_by_forward(model) as saved:
            model(**batch(tokens=tokens))
        kept.append(saved.bytes)
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_taps_are_the_hidden_states_of_transformers(pooling: str) -> None:
    backbone = deep()
    model = ladder(backbone, pooling=pooling)
    assert model.layers == [3, 7]
    inputs = batch()
    taken = model.hidden_states({"input_ids": inputs["input_ids"], "attention_mask": None}, inputs["attention_mask"])
    whole = backbone.eval()(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[4].float()
    expected = whole.mean(1) if pooling == "mean" else whole[:, -1]
    assert torch.allclose(taken[0], expected, atol=1e-6)
    assert len(taken) == 2


def test_pooling_by_hand() -> None:
    states = torch.tensor([[[1.0], [2.0], [float("nan")]], [[9.0], [4.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(states, mask, "mean").tolist() == [[1.5], [5.0]]
    assert pool(states, mask, "last").tolist() == [[2.0], [6.0]]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pooling: str, side: str) -> None:
    model = ladder(pooling=pooling).eval()
    inputs = batch()
    padding = torch.zeros(4, 3, dtype=torch.int64)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    padded = {
        "input_ids": torch.cat(order(inputs["input_ids"], padding), 1),
        "attention_mask": torch.cat(order(inputs["attention_mask"], padding), 1),
    }
    assert torch.allclose(model(**padded).logits, model(input_ids=inputs["input_ids"]).logits, atol=1e-5)


def test_all_weight_on_one_layer_is_the_probe_of_that_layer() -> None:
    backbone = deep()
    model, probe = ladder(backbone, layers=[1, 4, 6]), ladder(backbone, layers=[4])
    probe.adapters[0].load_state_dict(model.adapters[1].state_dict())
    probe.head.load_state_dict(model.head.state_dict())
    assert model.weights is not None
    with torch.no_grad():
        model.weights.copy_(torch.tensor([float("-inf"), 0.0, float("-inf")]))
    assert torch.equal(model(**batch()).logits, probe(**batch()).logits)


@pytest.mark.parametrize("fusion", ["sum", "softmax", "concat"])
def test_without_what_the_small_model_says_it_is_the_ensemble_of_layers(fusion: str) -> None:
    backbone = deep()
    alone = ladder(backbone, fusion=fusion)
    both = ladder(backbone, fusion=fusion, side=Side(), side_features=10)
    state = alone.state_dict()
    if both.mix is not None:
        state["mix.weight"] = torch.cat([state["mix.weight"], torch.randn(16, 16)], dim=1)
    both.load_state_dict(state, strict=False)
    assert not torch.allclose(both(**batch()).logits, alone(**batch()).logits)
    assert both.side_adapter is not None
    nn.init.zeros_(both.side_adapter.weight)
    nn.init.zeros_(both.side_adapter.bias)
    assert torch.allclose(both(**batch()).logits, alone(**batch()).logits, atol=1e-6)


def test_fusions_by_hand() -> None:
    views = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])]
    beside = torch.tensor([[10.0, 20.0]])
    backbone = deep()
    assert ladder(backbone, fusion="sum", width=2)._fused(views, beside).tolist() == [[14.0, 27.0]]
    weighted = ladder(backbone, fusion="softmax", width=2)
    assert weighted.weights is not None
    with torch.no_grad():
        weighted.weights.copy_(torch.tensor([1.0, 3.0]).log())  # a quarter and three
    assert torch.allclose(weighted._fused(views, None), torch.tensor([[2.5, 4.25]]))


def test_the_trainer_trains_it_beside_a_small_model(tmp_path: Path) -> None:
    model = ladder(side=Side(), side_features=10)
    before = values(model)
    ids = torch.randint(3, 96, (64, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=4,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert {name for name in changed(model, before) if name.startswith("backbone")} == set()
    assert not model.backbone.training
    assert trainer.predict(rows).predictions.shape == (64, 3)  # type: ignore[arg-type]
    trainer.save_model(str(tmp_path / "saved"))


def test_encoders_are_tapped_too() -> None:
    model = ladder(build(BertModel, BertConfig, num_hidden_layers=5), fusion="concat")
    assert model.layers == [3]
    assert model(**batch()).logits.shape == (4, 3)


def test_what_does_not_fit_is_named_and_freezes_nothing() -> None:
    backbone = deep()
    for options, message in (
        ({"layers": [8]}, "layers must be some of 0 to 7"),
        ({"layers": []}, "layers must be some of"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"fusion": "mean"}, "fusion must be one of"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"side": Side()}, "side has no configuration with a hidden_size; give side_features"),
    ):
        with pytest.raises(ValueError, match=message):
            ladder(backbone, **options)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="one stack of blocks, found"):
        ladder(build(T5ForConditionalGeneration, T5Config, d_model=32, d_ff=48, num_layers=2))
