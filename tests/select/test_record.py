"""What tensors cost in FLOPs is what autograd executes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from cost_models import FAMILIES, OPT, checkpointed, counted, mixtral, selections, t5, text, translation
from select_models import build, llama, values
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from peftkern.select.record import record


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def needed_by(graph: Any, names: list[str]) -> list[set[str]]:
    """For each segment, which of ``names`` need it."""
    return [{name for name in names if i in graph.needed([name])} for i in range(len(graph.segments))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_costs_what_its_backward_pass_executes(family: str, caplog: pytest.LogCaptureFixture) -> None:
    make, make_batch = FAMILIES[family]
    model, batch = make(), make_batch()
    with caplog.at_level(logging.WARNING, "peftkern"):
        graph = record(model, batch)
    assert not [
        line for line in caplog.records if line.name == "peftkern"
    ]  # fake tensors have passed through, and every operator is known
    assert list(graph.by_name) != [] and set(graph.by_name) == set(trained(model))
    for names in selections(trained(model)):
        assert graph.step(names) == pytest.approx(counted(model, batch, names), rel=1e-12), names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_encoder_beside_a_decoder_costs_what_it_executes_within_one_percent(checkpointing: bool) -> None:
    # attention takes another kernel where its bias is trained, which no sum over tensors can tell
    model = checkpointed(t5()) if checkpointing else t5()
    graph = record(model, translation())
    for names in selections(trained(model)):
        assert graph.step(names) == pytest.approx(counted(model, translation(), names), rel=0.01), names


def test_an_encoder_is_reached_past_the_decoder() -> None:
    graph = record(t5(), translation())
    encoder, decoder = "encoder.block.1.layer.1.DenseReluDense.wo.weight", "decoder.block.0.layer.2.layer_norm.weight"
    cross = {"decoder.block.1.layer.1.EncDecAttention.k.weight", "decoder.block.1.layer.1.EncDecAttention.q.weight"}
    users = needed_by(graph, [encoder, decoder, *cross])
    assert {encoder} in users  # through keys and values, not along the decoder's own path
    assert {encoder, decoder, *cross} in users  # in front of the upper block of the decoder


def test_a_model_that_looks_at_numbers_runs_one_real_batch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = mixtral()
    before, state = values(model), torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "peftkern"):
        graph = record(model, text())
    assert "one real batch runs instead" in caplog.text
    for names in selections(trained(model)):
        assert graph.step(names) == pytest.approx(counted(model, text(), names), rel=1e-12), names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Two(nn.Module):
    """x [4, 3] through two linear layers; the loss is a plain sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5, bias=False)
        self.second = nn.Linear(5, 2)


def sum_of_outputs(model: Any, batch: Any) -> Tensor:
    outputs: Tensor = model.second(model.first(batch["x"]))
    return outputs.sum()


def test_two_layers_by_hand() -> None:
    graph = record(Two(), {"x": torch.ones(4, 3)}, loss=sum_of_outputs)
    # 4 x 3 x 5 and 4 x 5 x 2 multiply-adds, and the sum of 8 outputs
    assert graph.forward == 2 * 60 + 2 * 40 + 8
    # the error goes through the second layer for the first weight alone, and is that one's own cost
    costs = {"second.weight": 2 * 40, "second.bias": 8, "first.weight": 2 * 40 + 2 * 60}
    assert {name: tensor.cost for name, tensor in graph.by_name.items()} == costs
    assert graph.segments == ()


def test_projections_side_by_side_do_not_pay_for_each_other() -> None:
    graph = record(llama(), text())
    attention = "model.layers.1.self_attn"
    query, key = f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"
    norm = "model.layers.1.input_layernorm.weight"
    tokens, width = 14, 32
    both = {i for name in (query, key) for i in graph.needed([name])}
    through_query = graph.backward([query, norm]) - graph.backward([norm])
    assert through_query == 2 * tokens * width * width  # its dW alone: the error's path was paid for by the norm
    assert graph.needed([query]) != graph.needed([key])
    # rotary embeddings lie on each one's own path; 5 products, sums and copies of sign per element at most
    own = [graph.needed([query]) - graph.needed([key]), graph.needed([key]) - graph.needed([query])]
    assert all(0 < sum(graph.segments[i].cost for i in each) <= 5 * tokens * width for each in own)
    assert both < graph.needed([norm])


def test_a_tied_embedding_is_paid_at_both_ends() -> None:
    graph = record(llama(), text())
    embedding, first_norm = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
    tokens, vocabulary, width = 14, 96, 32
    head, table, their_sum = 2 * tokens * vocabulary * width, tokens * width, vocabulary * width
    assert graph.by_name[embedding].cost >= head + table + their_sum
    # no tensor lies deeper than the table of embeddings: below the first norm there is only itself
    assert graph.needed([first_norm]) == graph.needed([embedding])


def test_linear_weights_cost_what_the_paper_says() -> None:
    # GreenTrainer's table: B·N·n·m multiply-adds for dW and as many for dX; B·N·n for a bias
    graph = record(build(OPTForCausalLM, OPTConfig, **OPT), text())
    tokens, width, inner = 14, 32, 48
    layer = "model.decoder.layers.1"
    for name, size in {"self_attn.q_proj": width * width, "fc1": inner * width, "fc2": width * inner}.items():
        assert graph.by_name[f"{layer}.{name}.weight"].cost == 2 * tokens * size
    assert graph.by_name[f"{layer}.fc1.bias"].cost == tokens * inner
    # between the output of a layer and the norm in front of its feed-forward network lie fc2, fc1 and a ReLU
    above = graph.backward([f"{layer}.fc2.weight"]) - graph.by_name[f"{layer}.fc2.weight"].cost
    norm = f"{layer}.final_layer_norm.bias"
    below = graph.backward([norm]) - graph.by_name[norm].cost
    assert below - above == 2 * tokens * 2 * inner * width + tokens * inner


def test_under_autocast_a_selection_costs_what_it_executes() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        graph = record(model, text())
        for names in selections(trained(model)):
            assert graph.step(names) == pytest.approx(counted(model, text(), names), rel=1e-12), names


# ---- arguments, and what is left behind


def test_candidates_are_those_that_are_named() -> None:
    model = llama()
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    graph = record(model, text(), candidates=names)
    assert set(graph.by_name) == set(names)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for trained_names in ([names[0]], [names[1]], names):
        assert graph.step(trained_names) == counted(model, text(), trained_names)


def test_the_model_is_left_as_it_was() -> None:
    model = build(OPTForCausalLM, OPTConfig, **OPT, dropout=0.5)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.decoder.final_layer_norm.weight.grad = torch.ones(32)
    parameters, asked = list(model.parameters()), [parameter.requires_grad for parameter in model.parameters()]
    before, state = values(model), torch.get_rng_state()
    record(model, text())
    assert all(now is was for now, was in zip(model.parameters(), parameters, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.model.decoder.final_layer_norm.weight.grad, torch.ones(32))
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1


def test_statistics_of_a_real_batch_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.linear(x))
            return y if bool(y.sum() < 100) else -y  # a fake tensor has no sum

    model = Counting()
    record(model, {"x": torch.randn(4, 3)}, loss=lambda model, batch: model(batch["x"]).sum())
    assert torch.equal(model.norm.num_batches_tracked, torch.tensor(0))  # type: ignore[arg-type]
    assert torch.equal(model.norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["model.nothing.weight"]}, "no parameter 'model.nothing.weight'"),
        ({"candidates": []}, "nothing requires a gradient"),
        ({"loss": lambda model, batch: model(**batch).loss.detach()}, "depends on no candidate"),
        ({"loss": lambda model, batch: model(**batch).logits.new_zeros(())}, "depends on no candidate"),
    ],
)
def test_what_cannot_be_recorded_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(llama(), text(), **options)


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="give it labels"):
        record(llama(), {"input_ids": text()["input_ids"]})


def test_reentrant_checkpointing_is_refused() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        record(model, text())
