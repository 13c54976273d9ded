"""Gated blocks that make gate and up again: which do, that nothing else changes, and what they keep."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from patch_models import DEEP, TOLERANCE, assert_same_run, error, llama, llama_config, lora, run, text
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaForCausalLM
from transformers.activations import ACT2FN

from peftkern import sparse
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.patch import PatchError, adapters_by_row, patch, unpatch, verify
from peftkern.patch.gated import activation_name

MODES = ("mlp", "up")
TOKENS = 7


def adapted(base: str = "nf4", **options: Any) -> Any:
    return lora(llama(base), r=4, **options)


def block_rows(report: Any) -> list[Any]:
    return [row for row in report.rows if row.module.endswith(".mlp")]


def kept_inner(model: nn.Module) -> int:
    """How many tensors as wide as the gate a forward pass keeps; each storage counts once."""
    width = model.config.intermediate_size
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (width,) and tensor.shape[:-1].numel() == TOKENS:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**text(1, TOKENS))
    return len(kept)


# ---- what they compute, and keep


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4-double", "int8"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["q_proj"]])
def test_the_numbers_of_an_ordinary_patch(base: str, targets: Any) -> None:
    model = adapted(base, target_modules=targets, lora_dropout=0.2)
    patch(model)
    torch.manual_seed(6)
    expected = run(model, text())
    # a dense layer without adapters runs PyTorch's product on its own, and ours in a block
    tolerance = DEEP if base == "dense" and targets != "all-linear" else 0.0
    for recompute in MODES:
        patch(model, recompute=recompute)
        torch.manual_seed(6)
        assert_same_run(model, text(), expected, tolerance)


@pytest.mark.parametrize(("recompute", "kept"), [(None, 4), ("up", 2), ("mlp", 0)])
def test_what_is_kept(recompute: str | None, kept: int) -> None:
    model = adapted()
    patch(model, recompute=recompute)
    assert kept_inner(model) == kept


def test_verify_agrees() -> None:
    model = adapted("bnb-nf4")
    patch(model, recompute="mlp")
    assert verify(model, text()).ok


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_around_it(reentrant: bool) -> None:
    model = adapted(lora_dropout=0.2)
    patch(model, recompute="mlp")
    torch.manual_seed(6)
    expected = run(model, text())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(6)
    assert_same_run(model, text(), expected, tolerance=0.0)


def test_autocast() -> None:
    model = adapted()
    exact, errors = run(model, text())[1], []
    for recompute in (None, "mlp"):
        patch(model, recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            gradients = run(model, text())[1]
        errors.append(sum(error(gradients[name], gradient) for name, gradient in exact.items()) / len(exact))
    assert errors[1] <= 1.2 * errors[0]


def test_compiles_as_one_graph() -> None:
    block = adapted().base_model.model.model.layers[0].mlp.train()
    patch(block, recompute="mlp")
    x = torch.randn(2, 5, 64, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *filter(requires_grad, block.parameters())])
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, *filter(requires_grad, block.parameters())])
    assert max(map(error, actual, expected)) <= TOLERANCE


def requires_grad(parameter: Tensor) -> bool:
    return parameter.requires_grad


def test_disabled_adapters_and_evaluation() -> None:
    model = adapted()
    patch(model)
    with model.disable_adapter():
        alone = model(**text()).logits
        patch(model, recompute="mlp")
        assert torch.equal(model(**text()).logits, alone)
    with torch.no_grad():
        unkept = model(**text()).logits
    assert torch.equal(model(**text()).logits, unkept)
    assert not any(row.calls_left for row in patch(model).rows)


def test_sparse_deltas_in_every_layer() -> None:
    model = llama()
    model.requires_grad_(False)
    names = [name for name in sparse.linear_layers(model) if "mlp" in name]
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(shape, generator=generator) < 0.05 for name, shape in shapes.items()}
    sparse.attach(model, {name: SparseIndices.from_mask(mask) for name, mask in masks.items()})
    for parameter in filter(requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.1)
    patch(model)
    expected = run(model, text())
    assert any("values" in name for name in expected[1])
    patch(model, recompute="mlp")
    assert kept_inner(model) == 0
    assert_same_run(model, text(), expected, tolerance=0.0)


# ---- GELU


@pytest.mark.parametrize("recompute", [None, "mlp"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_gelu_blocks(activation: str, recompute: str | None) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    model = lora(GemmaForCausalLM(GemmaConfig(**sizes, **heads, hidden_activation=activation)).train())
    expected = run(model, text())
    report = patch(model, recompute=recompute)
    assert {row.action for row in block_rows(report)} == {"fused"}
    assert kept_inner(model) == (4 if recompute is None else 0)
    assert_same_run(model, text(), expected)


def test_activations_by_their_names() -> None:
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": None}
    assert {name: activation_name(ACT2FN[name]) for name in (*names, "gelu_new")} == {**names, "gelu_new": None}
    modules = (nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Tanh())
    assert [activation_name(module) for module in modules] == ["silu", "gelu", "gelu_tanh", None]
    x = torch.linspace(-3, 3, 50)
    for name, expected in (("gelu", "none"), ("gelu_pytorch_tanh", "tanh")):
        assert torch.equal(ACT2FN[name](x), nn.functional.gelu(x, approximate=expected))


# ---- what the report says


@pytest.mark.parametrize("recompute", MODES)
def test_the_report_names_the_blocks(recompute: str) -> None:
    report = patch(adapted(), recompute=recompute)
    halves = {"mlp": "gate and up", "up": "up"}[recompute]
    assert [row.reason for row in block_rows(report)] == [f"makes {halves} again in the backward pass"] * 2
    assert all(row.kernel.startswith("lora_mlp on ") for row in block_rows(report))
    assert f"makes {halves} again" in str(report)


def test_without_it_nothing_is_said() -> None:
    rows = block_rows(patch(adapted()))
    assert [(row.reason, row.kernel.split()[0]) for row in rows] == [("", "silu_mul")] * 2


def test_it_holds_until_unpatch() -> None:
    model = adapted()
    patch(model, recompute="mlp")
    assert {row.reason for row in block_rows(patch(model))} == {"makes gate and up again in the backward pass"}
    assert {row.reason for row in block_rows(patch(model, recompute="up"))} == {"makes up again in the backward pass"}
    assert kept_inner(model) == 2
    unpatch(model)
    assert {row.reason for row in block_rows(patch(model))} == {""}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_recompute_as_well(duplicate: Any) -> None:
    model = adapted()
    patch(model, recompute="mlp")
    assert kept_inner(duplicate(model)) == 0


def test_layers_that_are_trained_themselves_keep_what_they_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    expected = run(model, text())
    rows = block_rows(patch(model, recompute="mlp"))
    reason = "gate_proj: the base weight is trained itself; the fused path keeps it frozen"
    assert {row.reason for row in rows} == {f"keeps gate and up: {reason}"}
    assert {row.kernel.split()[0] for row in rows} == {"silu_mul"}
    assert_same_run(model, text(), expected)
    assert "keeps gate and up" in caplog.text
    assert [dict(row.calls_left) for row in block_rows(patch(model))] == [{reason: 1}] * 2


def test_hooks_on_a_layer_run_and_are_named() -> None:
    model, seen = adapted(), []
    patch(model, recompute="mlp")
    block = model.base_model.model.model.layers[0].mlp
    block.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert kept_inner(model) == 2
    assert seen == [1]
    first, second = block_rows(patch(model))
    assert (first.reason, dict(first.calls_left)) == (
        "keeps gate and up: up_proj: it has hooks",
        {"up_proj: it has hooks": 1},
    )
    assert second.reason == "makes gate and up again in the backward pass" and not second.calls_left


def test_dora_keeps_a_block_from_it() -> None:
    model = adapted("dense", target_modules=["up_proj"], use_dora=True)
    expected = run(model, text())
    rows = block_rows(patch(model, recompute="mlp"))
    assert {row.reason for row in rows} == {"keeps gate and up: up_proj: its adapter is DoRA's"}
    assert_same_run(model, text(), expected)


def test_rows_with_adapters_of_their_own_keep_what_they_kept() -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    patch(model)
    with adapters_by_row(model, ["default", "other"]):
        expected = run(model, text())
        patch(model, recompute="mlp")
        assert_same_run(model, text(), expected, tolerance=0.0)
    calls = block_rows(patch(model))[0].calls_left
    assert dict(calls) == {"gate_proj: rows of the batch have adapters of their own": 1}
    assert kept_inner(model) == 0


def test_a_model_without_gated_blocks_has_none() -> None:
    report = patch(LlamaForCausalLM(llama_config(hidden_act="relu")), recompute="mlp")
    assert {row.action for row in block_rows(report)} == {"left"}


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"recompute must be one of mlp, up, a word for each layer, or None; got 'all'"
    ):
        patch(adapted(), recompute="all")
    with pytest.raises(PatchError):
        patch(adapted(), recompute="mlp", kernels="triton")
