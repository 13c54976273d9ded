"""Training with patched models: Trainer, gradient checkpointing, accelerate, torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import torch
from patch_models import DEEP, assert_same_run, error, fused_modules, llama, lora, run, text
from transformers import Trainer, TrainingArguments

from peftkern.patch import patch, unpatch


def train(model: Any, folder: Path, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    rows = [{key: value[0] for key, value in text(1, seed=seed).items()} for seed in range(6)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=7,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base", ["dense", "bnb-nf4-double", "bnb-int8", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_steps_of_trainer_agree(base: str, checkpointing: bool, tmp_path: Path) -> None:
    losses, parameters = [], []
    for patched in (False, True):
        model = lora(llama(base))
        if patched:
            patch(model, strict=True)
        result = train(model, tmp_path, gradient_checkpointing=checkpointing)
        losses.append(result[0])
        parameters.append(result[1])
        assert not any(module.__dict__["_peftkern"].calls_left for module in fused_modules(model).values())
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][2]
    for name, parameter in parameters[0].items():
        assert error(parameters[1][name], parameter) <= 1e-4, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = lora(llama("nf4"), lora_dropout=0.4)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        patch(model, strict=True)
        torch.manual_seed(5)
        results.append(run(model, text()))
    assert error(results[1][0], results[0][0]) <= DEEP
    for name, gradient in results[0][1].items():
        assert error(results[1][1][name], gradient) <= DEEP, name


def test_a_second_backward_through_the_same_graph() -> None:
    model = lora(llama("bnb-nf4"))
    patch(model)
    loss = model(**text()).loss
    loss.backward(retain_graph=True)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    once = parameter.grad.clone()
    loss.backward()
    assert torch.allclose(parameter.grad, 2 * once)


def test_frozen_adapters_get_no_gradient() -> None:
    model = lora(llama("nf4"))
    patch(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    _, gradients = run(model, text())
    assert len(gradients) == 27


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "bnb-int8", "nf4"])
def test_compiled_whole(base: str) -> None:
    model = lora(llama(base))
    patch(model, strict=True)
    expected = run(model, text())
    decoder = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 3, 64)
    eager = decoder(x)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    assert error(compiled(x), eager) <= DEEP
    torch._dynamo.reset()
    assert_same_run(model, text(), expected)


# ---- accelerate's hooks


def hooked_base(model: Any, offload: bool) -> Any:
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    options = {"offload": True, "weights_map": {"weight": layer.base_layer.weight.detach()}} if offload else {}
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", **options)
    accelerate.hooks.add_hook_to_module(layer.base_layer, hook)
    return layer


def test_hooks_that_only_align_devices_are_taken() -> None:
    model = lora(llama())
    expected = run(model, text())
    hooked_base(model, offload=False)
    patch(model, strict=True)
    assert_same_run(model, text(), expected)
    assert not any(module.__dict__["_peftkern"].calls_left for module in fused_modules(model).values())


def test_hooks_that_bring_weights_are_left() -> None:
    model = lora(llama())
    expected = model(**text()).logits
    layer = hooked_base(model, offload=True)
    assert layer.base_layer.weight.is_meta
    report = patch(model)
    assert report.reasons["the base layer has hooks, which the fused product would skip"] == 1
    assert error(model(**text()).logits, expected) <= DEEP


def test_a_layer_whose_forward_was_replaced_is_left() -> None:
    for base in ("dense", "bnb-nf4"):
        model = lora(llama(base)) if base == "dense" else llama(base)
        name = "base_model.model.model.layers.0.mlp.up_proj" if base == "dense" else "model.layers.0.mlp.up_proj"
        layer = model.get_submodule(name)
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        report = patch(model)
        [row] = [row for row in report.left if row.module == name]
        assert row.reason.startswith("its forward was replaced on the instance")
        assert row.wanted
        unpatch(model)
