"""What patching leaves alone, and how it is undone, repeated, copied and saved."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from patch_models import (
    ALORA,
    BASES,
    OTHER_CLASSES,
    OTHERS,
    OTHERS_LEFT,
    classes,
    fused_modules,
    llama,
    lora,
    run,
    text,
)
from peft.tuners.lora import layer as lora_layer
from torch import nn

from peftkern.patch import PatchError, patch, unpatch
from peftkern.patch import fused as fused_file


def snapshot(model: nn.Module) -> dict[str, dict[str, object]]:
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("base", BASES)
def test_unpatch_puts_back_what_was_there(base: str) -> None:
    model = lora(llama(base))
    before, was = run(model, text()), classes(model)
    attributes = snapshot(model)
    patch(model)
    assert classes(model) != was
    run(model, text())
    restored = unpatch(model)
    assert restored == (30 if base.startswith("bnb") else 16) + OTHERS
    assert classes(model) == was
    for name, values in snapshot(model).items():
        assert values.keys() == attributes[name].keys()
        assert all(values[key] is attributes[name][key] for key in values if key not in ("training", "_view"))
    after = run(model, text())
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_unpatch_without_patch_does_nothing() -> None:
    model = lora(llama())
    was = classes(model)
    assert unpatch(model) == 0
    assert classes(model) == was


def test_patch_changes_nothing_but_classes() -> None:
    model = lora(llama("bnb-nf4"))
    calls: list[str] = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    state, text_of_model = model.state_dict(), str(model)
    parameters = dict(model.named_parameters())
    patch(model)
    assert str(model) == text_of_model
    assert isinstance(layer, peft.tuners.lora.bnb.Linear4bit)
    assert isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit)
    assert type(layer).__name__ == "Linear4bit"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    model(**text())
    assert calls == ["forward"]


def test_classes_of_peft_transformers_and_bitsandbytes_are_untouched() -> None:
    owners = [lora_layer.Linear, lora_layer.LoraLayer, peft.tuners.lora.bnb.Linear4bit, bitsandbytes.nn.Linear4bit]
    before = [dict(vars(owner)) for owner in owners]
    patched, other = lora(llama("bnb-nf4")), lora(llama("bnb-nf4"))
    patch(patched)
    run(patched, text())
    # `abc` keeps a registry of subclasses that it has looked at
    assert [dict(vars(owner)) for owner in owners] == before
    assert not fused_modules(other)


def test_patch_is_idempotent() -> None:
    model = lora(llama("bnb-nf4"))
    first = patch(model)
    was = classes(model)
    second = patch(model)
    assert classes(model) == was
    assert second == first
    assert unpatch(model) == 30 + OTHERS


def test_layers_of_one_class_share_one_fused_class() -> None:
    model = lora(llama())
    patch(model)
    fused_classes = {type(m) for m in fused_modules(model).values() if type(m).__name__ not in OTHER_CLASSES}
    assert sorted(fused_class.__name__ for fused_class in fused_classes) == ["Linear", "LlamaMLP"]


def test_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama("bnb-nf4"))
    was, attributes = classes(model), snapshot(model)
    real, calls = fused_file.set_class, []

    def failing(module: nn.Module, layer_class: type) -> None:
        calls.append(module)
        if len(calls) == 9:
            raise KeyboardInterrupt
        real(module, layer_class)

    monkeypatch.setattr(fused_file, "set_class", failing)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    monkeypatch.undo()
    assert len(calls) > 9
    assert classes(model) == was
    assert {name: values.keys() for name, values in snapshot(model).items()} == {
        name: values.keys() for name, values in attributes.items()
    }


def test_failing_repeat_leaves_the_first_patch_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama())
    patch(model, kernels="reference")
    model.add_adapter("more", peft.LoraConfig(target_modules=["lm_head"]))
    was = classes(model)

    def failing(module: nn.Module, layer_class: type) -> None:
        raise MemoryError

    monkeypatch.setattr(fused_file, "set_class", failing)
    with pytest.raises(MemoryError):
        patch(model)
    monkeypatch.undo()
    assert classes(model) == was
    assert {m.__dict__["_peftkern"].backend for m in fused_modules(model).values()} == {"reference"}


def test_strict_raises_and_changes_nothing() -> None:
    model = lora(llama(), **ALORA)
    was = classes(model)
    with pytest.raises(PatchError, match=r"14 modules cannot be taken.*\n.*ALoraLinearVariant"):
        patch(model, strict=True)
    assert classes(model) == was


def test_strict_does_not_mind_what_nobody_asked_for() -> None:
    model = lora(llama(), target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    report = patch(model, strict=True)
    assert report.counts == {"fused": 4 + OTHERS, "left": 14 + OTHERS_LEFT}


@pytest.mark.parametrize("kernels", ["reference", "cpu", "auto"])
def test_kernels_are_what_the_modules_use(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama())
    if kernels == "cpu" and not native_kernels_are_built():
        with pytest.raises(PatchError, match="kernels='cpu'"):
            patch(model, kernels=kernels)
        return
    report = patch(model, kernels=kernels)
    asked: dict[str, list[str | None]] = {"lora_linear": [], "gated_lora_linear": []}

    def note(operation: str) -> Callable[..., Any]:
        real = getattr(fused_file, operation)
        return lambda *a, **options: (asked[operation].append(options["backend"]), real(*a, **options))[1]

    for operation in asked:
        monkeypatch.setattr(fused_file, operation, note(operation))
    model(**text())
    backend = None if kernels == "auto" else kernels
    assert asked == {"lora_linear": [backend] * 12, "gated_lora_linear": [backend] * 2}
    if kernels != "auto":
        operations = ("lora_linear", "silu_mul", "rms_norm", "rms_norm with residual", "rotary and attention")
        assert {row.kernel for row in report.fused} == {f"{operation} on {kernels}" for operation in operations}


def native_kernels_are_built() -> bool:
    return importlib.util.find_spec("peftkern._cpu") is not None


def test_patching_again_can_change_the_kernels() -> None:
    model = lora(llama("bnb-nf4"))
    patch(model)
    patch(model, kernels="reference")
    assert {m.__dict__["_peftkern"].backend for m in fused_modules(model).values()} == {"reference"}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kernels must be 'auto' or one of"):
        patch(llama(), kernels="gpu")
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, got dict"):
        patch({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unpatch: model must be a torch\.nn\.Module, got str"):
        unpatch("model")  # type: ignore[arg-type]


def test_forced_backend_that_cannot_run_raises_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama(dtype=torch.float64))
    was = classes(model)
    monkeypatch.delenv("PEFTKERN_BACKEND", raising=False)
    with pytest.raises(PatchError, match=r"kernels='cpu'.*the model is unchanged"):
        patch(model, kernels="cpu")
    assert classes(model) == was


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_stay_patched_and_work(base: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = lora(llama(base))
    patch(model, kernels="reference")
    expected = run(model, text())
    copied = duplicate(model)
    assert classes(copied) == classes(model)
    assert {m.__dict__["_peftkern"].backend for m in fused_modules(copied).values()} == {"reference"}
    # dirty the original: the copy must not look at its memory
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    logits, gradients = run(copied, text())
    assert torch.equal(logits, expected[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())
    assert unpatch(copied) == len(fused_modules(model))


def test_shared_layers_are_patched_once() -> None:
    torch.manual_seed(0)
    inner = nn.Linear(8, 8)
    model = peft.get_peft_model(nn.Sequential(inner, nn.Tanh(), inner), peft.LoraConfig(target_modules=["0"]))
    report = patch(model)
    assert report.counts["fused"] == 1
    assert unpatch(model) == 1


def test_unpatch_refuses_a_class_on_top_of_ours() -> None:
    model = lora(llama())
    patch(model)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    ours = type(layer)
    layer.__class__ = type("Sharded", (ours,), {})
    was = classes(model)
    with pytest.raises(PatchError, match=r"layers\.1\.mlp\.up_proj was patched and then became a Sharded"):
        unpatch(model)
    assert classes(model) == was
    layer.__class__ = ours
    assert unpatch(model) == 16 + OTHERS


def test_a_subclass_that_keeps_pefts_forward_is_taken_like_peft_does() -> None:
    model = lora(llama())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    theirs = type("FSDPLinear", (type(layer),), {})
    layer.__class__ = theirs
    report = patch(model)
    assert report.counts["fused"] == 16 + OTHERS
    assert isinstance(layer, theirs)
    unpatch(model)
    assert type(layer) is theirs
