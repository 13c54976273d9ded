"""Adapters that the fused product does not cover, and calls of PEFT on patched models."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from patch_models import (
    ALORA,
    BASES,
    DEEP,
    OTHER_CLASSES,
    OTHERS,
    TOLERANCE,
    assert_same_run,
    error,
    fused_modules,
    gpt2,
    llama,
    lora,
    run,
    text,
    twin,
)
from torch import nn

from peftkern.nn import QuantizedLinear
from peftkern.ops.dora_linear import row_squares
from peftkern.patch import fused, patch, unpatch

QUANTIZED = [base for base in BASES if base != "dense"]


def layer_of(model: Any, name: str = "layers.0.mlp.up_proj") -> Any:
    return model.base_model.model.model.get_submodule(name)


# ---- what is left to PEFT


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "nf4"])
def test_variants_run_pefts_own_code(base: str) -> None:
    model = lora(llama(base), **ALORA)
    batch = text()
    batch["input_ids"][:, 2:4] = torch.tensor([5, 6])
    expected = run(model, batch)
    report = patch(model)
    rows = [row for row in report.rows if row.kind.startswith("lora.")]
    assert len(rows) == 14
    assert {(row.action, row.reason) for row in rows} == {("left", "adapter 'default' is a ALoraLinearVariant")}
    # over bitsandbytes the base layer runs on our kernel all the same, and says so in a row of its own
    assert report.counts["fused"] == 2 + OTHERS + (14 if base == "bnb-nf4" else 0)
    assert_same_run(model, batch, expected)


# ---- DoRA


def dora(base: str, **options: Any) -> Any:
    """Magnitudes are away from the norms, so that both matter."""
    model = lora(llama(base), use_dora=True, **options)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.7, 1.4, parameter.numel())
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "bnb-int8", "nf4"])
def test_dora_is_fused(base: str, dropout: float) -> None:
    model = dora(base, lora_dropout=dropout)
    torch.manual_seed(5)
    expected = run(model, text())
    report = patch(model, strict=True)
    rows = [row for row in report.rows if row.kind.startswith("lora.")]
    assert len(rows) == 14
    assert {(row.action, row.kernel.split(" on ")[0]) for row in rows} == {("fused", "dora_linear")}
    torch.manual_seed(5)
    assert_same_run(model, text(), expected)
    assert not any(row.calls_left for row in patch(model).rows)


def test_dora_is_fused_over_a_transposed_weight_and_measures_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(gpt2(), use_dora=True, target_modules=["c_attn", "c_fc"])
    expected = run(model, text())
    assert sum(row.kernel.startswith("dora_linear") for row in patch(model).fused) == 4
    measured = []
    monkeypatch.setattr(fused, "row_squares", lambda weight: measured.append(weight) or row_squares(weight))
    for _ in range(2):
        assert_same_run(model, text(), expected)
    assert len(measured) == 4


def test_dora_follows_its_magnitudes_factors_and_weight() -> None:
    model = dora("dense")
    patch(model)
    run(model, text())  # keeps what it has measured of the weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    expected = run(twin_unpatched(model), text())
    assert_same_run(model, text(), expected)


def test_dora_beside_another_adapter_is_left() -> None:
    model = dora("nf4")
    model.add_adapter("plain", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    expected = run(twin_unpatched(model), text())
    report = patch(model)
    assert "adapter 'default' is DoRA's and not the only one that runs" in {row.reason for row in report.left}
    assert_same_run(model, text(), expected)


def test_a_layer_with_a_plain_and_a_dora_adapter_follows_the_active_one() -> None:
    model = lora(llama())
    model.add_adapter("dora", peft.LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False))
    assert patch(model).counts["fused"] == 16 + OTHERS
    model.set_adapter("dora")
    expected = run(twin_unpatched(model), text())
    report = patch(model)
    assert report.counts["fused"] == 16 + OTHERS
    assert {row.kernel.split(" on ")[0] for row in report.fused if "proj" in row.module} == {"dora_linear"}
    assert_same_run(model, text(), expected)
    model.set_adapter("default")
    expected = run(twin_unpatched(model), text())
    assert_same_run(model, text(), expected)


def twin_unpatched(model: nn.Module) -> Any:
    copied = twin(model)
    unpatch(copied)
    return copied


def test_adapters_on_embeddings_and_convolutions_are_named() -> None:
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(7, 4))
    model.add_module("conv", nn.Conv1d(4, 4, 1))
    model.add_module("linear", nn.Linear(4, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed", "conv", "linear"]))
    report = patch(adapted, strict=True)
    assert {row.module.split(".")[-1]: (row.kind, row.action) for row in report.rows} == {
        "embed": ("lora.Embedding", "left"),
        "conv": ("lora.Conv1d", "left"),
        "linear": ("lora.Linear", "fused"),
    }


def test_other_adapters_than_lora_are_named() -> None:
    model = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    report = patch(model)
    assert report.reasons["an adapter of another kind than LoRA"] == 2
    assert {type(module).__name__ for module in fused_modules(model).values()} - OTHER_CLASSES == {"LlamaMLP"}


def test_adalora_is_left() -> None:
    model = peft.get_peft_model(llama(), peft.AdaLoraConfig(target_modules=["k_proj"], total_step=10))
    assert patch(model).reasons["adalora.SVDLinear computes something of its own"] == 2


def test_a_base_layer_with_a_forward_of_its_own_is_left() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = peft.get_peft_model(nn.Sequential(Doubled(4, 3)), peft.LoraConfig(target_modules=["0"]))
    x = torch.randn(2, 4)
    expected = model(x)
    report = patch(model)
    assert [row.reason for row in report.rows] == ["the base layer Doubled computes something of its own"]
    assert torch.equal(model(x), expected)


def test_a_weight_of_a_special_tensor_class_is_left() -> None:
    class Scaled(torch.Tensor):
        pass

    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(target_modules=["0"]))
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Scaled), requires_grad=False)
    assert [row.reason for row in patch(model).left] == ["the weight of the base layer is a Scaled, not a plain tensor"]


def test_an_integer_weight_in_a_plain_linear_is_left() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(target_modules=["0"]))
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    assert "the base weight has dtype torch.int8" in patch(model).left[0].reason


def test_an_input_on_another_device_is_left_to_peft() -> None:
    model = lora(llama("bnb-nf4"))
    patch(model)
    for layer in (layer_of(model), layer_of(model).base_layer):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # whatever comes of it is theirs
            layer(torch.empty(2, 64, device="meta"))
        assert list(layer.__dict__["_peftkern"].calls_left) == ["the input is on meta and the base weight on cpu"]


def test_a_trained_base_weight_is_left_even_when_it_is_unfrozen_later() -> None:
    model = lora(llama())
    patch(model)
    layer_of(model).base_layer.weight.requires_grad_(True)
    expected = run(twin_unpatched(model), text())
    assert_same_run(model, text(), expected)
    reason = "the base weight is trained itself; the fused path keeps it frozen"
    assert patch(model).reasons == {reason: 1, "dense, no adapter": 1}


def test_mixed_batches_run_pefts_own_code_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = lora(llama()).eval()
    model.add_adapter("other", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    batch = {"input_ids": text(3)["input_ids"], "adapter_names": ["default", "other", "__base__"]}
    expected = model(**batch).logits
    patch(model)
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        assert error(model(**batch).logits, expected) <= DEEP
        model(**batch)
    messages = [record.getMessage() for record in caplog.records if record.name == "peftkern"]
    assert messages == [
        "base_model.model.model.layers.0.self_attn.q_proj runs its original forward: called with adapter_names"
    ]
    rows = [row for row in patch(model).fused if row.weight]
    assert {tuple(row.calls_left.items()) for row in rows} == {(("called with adapter_names", 2),)}


def test_hooks_on_inner_layers_are_called(caplog: pytest.LogCaptureFixture) -> None:
    model = lora(llama())
    patch(model)
    layer, calls = layer_of(model), []
    handles = [
        inner.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, inner in [("base", layer.base_layer), ("A", layer.lora_A["default"])]
    ]
    model(**text())
    assert calls == ["base", "A"]
    assert sum(layer.__dict__["_peftkern"].calls_left.values()) == 1
    for handle in handles:
        handle.remove()
    model(**text())
    assert calls == ["base", "A"]


def test_adapters_that_are_no_plain_linear_layers_are_left() -> None:
    model = lora(llama())
    patch(model)
    layer = layer_of(model)
    nn.utils.parametrizations.weight_norm(layer.lora_A["default"])
    actual = run(model, text())
    [reason] = layer.__dict__["_peftkern"].calls_left
    assert reason == "adapter 'default' holds a ParametrizedLinear, not a plain Linear"
    unpatch(model)
    assert_same_run(model, text(), actual)


def test_another_dropout_module_is_left() -> None:
    model = lora(llama())
    patch(model)
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.3)
    model(**text())
    assert list(layer_of(model).__dict__["_peftkern"].calls_left) == [
        "adapter 'default' has a AlphaDropout as its dropout"
    ]


# ---- PEFT's own calls on a patched model


@pytest.mark.parametrize("base", BASES)
def test_disabling_and_enabling(base: str) -> None:
    model = lora(llama(base))
    with model.disable_adapter():
        expected = model(**text()).logits
    on = model(**text()).logits
    patch(model)
    with model.disable_adapter():
        assert error(model(**text()).logits, expected) <= DEEP
        assert {row.reason.split(";")[0] for row in patch(model).fused if row.weight} == {
            "adapters are disabled now: the base layer runs alone"
        }
    assert error(model(**text()).logits, on) <= DEEP
    assert all(not m.__dict__["_peftkern"].calls_left for m in fused_modules(model).values())


@pytest.mark.parametrize("base", BASES)
def test_several_adapters(base: str) -> None:
    model = lora(llama(base))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    unpatched = twin(model)
    patch(model, strict=True)
    for active in ("other", "default", ["default", "other"], ["other", "default"]):
        for each in (model, unpatched):
            each.base_model.set_adapter(active)
        assert_same_run(model, text(), run(unpatched, text()))


def test_patterns_rslora_and_lora_bias() -> None:
    options = {
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"up_proj": 31},
        "use_rslora": True,
        "lora_bias": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora(llama(), **options)
    expected = run(model, text())
    assert any(name.endswith("lora_B.default.bias") for name in expected[1])
    patch(model, strict=True)
    assert_same_run(model, text(), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_adapter_on_the_output_head(tied: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora(llama(tied=tied), target_modules=["q_proj", "lm_head"])
    head = model.base_model.model.lm_head
    assert (head.base_layer.weight is model.base_model.model.model.embed_tokens.weight) == tied
    expected = run(model, text())
    report = patch(model, strict=True)
    assert "base_model.model.lm_head" in [row.module for row in report.fused]
    assert_same_run(model, text(), expected)


def test_adapters_tied_to_those_of_the_embedding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora(llama(tied=True), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    head = model.base_model.model.lm_head
    if not hasattr(head, "lora_A"):
        pytest.fail("PEFT no longer adapts the tied head")
    assert not head.lora_A["default"].weight.is_contiguous()
    expected = run(model, text())
    patch(model)
    assert_same_run(model, text(), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save(tied: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora(llama(tied=tied), modules_to_save=["lm_head"], target_modules=["q_proj"])
    expected = run(model, text())
    assert any("modules_to_save" in name for name in expected[1])
    report = patch(model, strict=True)
    [row] = [row for row in report.rows if row.module.endswith("lm_head")]
    assert (row.kind, row.action) == ("ModulesToSaveWrapper", "left")
    assert_same_run(model, text(), expected)


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "nf4"])
def test_adapters_injected_without_a_peft_model(base: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    model = peft.inject_adapter_in_model(config, llama(base))
    expected = run(model, text())
    report = patch(model, strict=True)
    assert sum(row.kind.startswith("lora.") for row in report.fused) == 4
    assert_same_run(model, text(), expected)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_generating(base: str) -> None:
    model = lora(llama(base)).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=text()["input_ids"], **options)
    patch(model)
    assert torch.equal(model.generate(input_ids=text()["input_ids"], **options), expected)


def test_adapters_added_later() -> None:
    model = lora(llama("nf4"), target_modules=["q_proj"])
    assert patch(model).counts["fused"] == 16 + OTHERS
    model.add_adapter("wide", peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter("wide")
    expected = run(twin_unpatched(model), text())
    assert_same_run(model, text(), expected)
    assert len(fused_modules(model)) == 4 + OTHERS
    patch(model, strict=True)
    assert len(fused_modules(model)) == 6 + OTHERS
    assert_same_run(model, text(), expected)


def test_deleting_an_adapter() -> None:
    model = lora(llama())
    model.add_adapter("other", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    patch(model)
    model.delete_adapter("default")
    expected = run(twin_unpatched(model), text())
    assert_same_run(model, text(), expected)


def test_scaling_is_read_on_every_call() -> None:
    model = lora(llama())
    patch(model)
    for module in fused_modules(model).values():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2.5)  # type: ignore[operator]
    assert_same_run(model, text(), run(twin_unpatched(model), text()))


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "nf4"])
def test_saved_adapters_are_pefts_own(base: str, tmp_path: Path) -> None:
    model = lora(llama(base))
    model.save_pretrained(tmp_path / "unpatched")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    files = [tmp_path / kind / "adapter_model.safetensors" for kind in ("unpatched", "patched")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = "adapter_config.json"
    assert (tmp_path / "unpatched" / config).read_text() == (tmp_path / "patched" / config).read_text()
    expected = run(model, text())
    loaded = peft.PeftModel.from_pretrained(llama(base), tmp_path / "patched", is_trainable=True).train()
    patch(loaded)
    assert_same_run(loaded, text(), expected, 0.0)
    loaded.load_adapter(tmp_path / "patched", "again", is_trainable=True)
    loaded.set_adapter("again")
    assert error(loaded(**text()).logits.detach(), expected[0]) == 0.0


# ---- merging


def test_merging_dense_weights() -> None:
    model = lora(llama())
    expected = run(model, text())
    patch(model)
    model.merge_adapter()
    assert error(model(**text()).logits.detach(), expected[0]) <= DEEP
    reasons = {row.reason for row in patch(model).fused if row.weight}
    assert reasons == {"adapters are merged now: the base layer runs alone"}
    model.unmerge_adapter()
    assert_same_run(model, text(), expected)


@pytest.mark.parametrize("base", ["bnb-nf4", "bnb-nf4-double", "bnb-int8"])
@pytest.mark.filterwarnings("ignore")
def test_merging_bitsandbytes_weights_is_pefts(base: str) -> None:
    model = lora(llama(base))
    reference = twin(model)
    patch(model)
    run(model, text())  # views of the old weights exist when the new ones arrive
    for each in (model, reference):
        each.merge_adapter()
    assert error(model(**text()).logits.detach(), reference(**text()).logits.detach()) <= DEEP
    for each in (model, reference):
        each.unmerge_adapter()
    assert_same_run(model, text(), run(reference, text()))


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_packed_weights(base: str, dora: bool, safe: bool) -> None:
    model = lora(llama(base), use_dora=dora)
    patch(model)
    layer = layer_of(model)
    before, expected = layer.base_layer.quantized, run(model, text())
    x = torch.randn(5, 64)
    unmerged = layer(x).detach()
    with pytest.warns(UserWarning, match="rounds the sum to its format"):
        model.merge_adapter(safe_merge=safe)
    assert layer.merged
    # the sum is rounded to the format again: close to, but not the unmerged product
    assert 1e-6 < error(layer(x), unmerged) < (0.15 if base == "nf4" else 0.02)
    model.unmerge_adapter()
    after = layer.base_layer.quantized
    assert torch.equal(before.packed, after.packed)
    assert torch.equal(before.scale_values(), after.scale_values())
    assert_same_run(model, text(), expected, 0.0)


def test_merging_biases_into_a_packed_layer() -> None:
    inner = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(64, 32), "int8"))
    config = peft.LoraConfig(target_modules=["0"], lora_bias=True, init_lora_weights=False, lora_alpha=16)
    model = peft.get_peft_model(inner, config)
    torch.nn.init.normal_(model.base_model.model[0].lora_B["default"].bias)
    patch(model)
    x = torch.randn(3, 64)
    expected, bias = model(x).detach(), model.base_model.model[0].base_layer.bias.detach().clone()
    with pytest.warns(UserWarning, match="rounds"):
        model.merge_adapter()
    assert error(model(x).detach(), expected) < 0.02
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.bias, bias)
    assert torch.equal(model(x), expected)


def test_unmerging_after_the_kept_weight_is_gone_is_approximate() -> None:
    model = lora(llama("int8"))
    patch(model)
    expected = model(**text()).logits.detach()
    with pytest.warns(UserWarning, match="rounds"):
        model.merge_adapter()
    unpatch(model)
    patch(model)
    model.unmerge_adapter()
    assert not layer_of(model).merged
    assert 0 < error(model(**text()).logits.detach(), expected) < 0.05


def test_merging_a_bias_that_has_no_place_changes_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora(llama("nf4"), lora_bias=True)
    patch(model)
    expected = run(model, text())
    with pytest.raises(RuntimeError, match="adapter 'default' has a bias"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert_same_run(model, text(), expected, 0.0)


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "nf4"])
@pytest.mark.filterwarnings("ignore")
def test_merge_and_unload(base: str) -> None:
    model = lora(llama(base))
    patch(model)
    expected = model(**text()).logits.detach()
    plain = model.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in plain.modules())
    assert error(plain(**text()).logits.detach(), expected) < (DEEP if base == "dense" else 0.3)
    unpatch(plain)
    assert not fused_modules(plain)


@pytest.mark.parametrize("base", ["dense", "bnb-nf4"])
def test_unload(base: str) -> None:
    untouched = llama(base)
    expected = untouched(**text()).logits.detach()
    model = lora(llama(base))
    patch(model)
    plain = model.unload()
    assert error(plain(**text()).logits.detach(), expected) <= TOLERANCE * 10


def test_merged_adapter_file_round_trip(tmp_path: Path) -> None:
    model = lora(llama())
    patch(model)
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert not any("peftkern" in name for name in tensors)
