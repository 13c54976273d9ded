"""Packed experts with LoRA on their parameters: each multiplies its own tokens, and no sum of weights is made."""

from __future__ import annotations

import ast
import copy
import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from model_families import FAMILIES
from patch_models import DEEP, assert_same_run, error, fused_modules, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.patch import patch, unpatch, verify
from peftkern.patch.experts import ON_A_PARAMETER, PACKED_EXPERTS

MIXTRAL = FAMILIES["mixtral"]
BATCH = MIXTRAL.batch()
MODELS = Path(transformers.__file__).parent / "models"


def mixtral(config: dict[str, Any] | None = None, **options: Any) -> Any:
    return MIXTRAL.with_lora("dense", config, **options)


def experts_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.experts


def patched_experts(model: Any) -> list[Any]:
    return [module for name, module in fused_modules(model).items() if name.endswith("experts")]


def source_of(module: str, class_name: str) -> tuple[str, set[str], list[str]]:
    """Of a class of transformers, without importing it: its forward, its methods and its decorators."""
    text = (MODELS / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    match = re.search(rf"^(?:@.*\n)*class {class_name}\(.*\n(?:[ \n].*\n|\n)*", text, re.MULTILINE)
    assert match is not None, module
    [found] = ast.parse(match.group()).body
    assert isinstance(found, ast.ClassDef)
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    return ast.unparse(methods["forward"]), set(methods), [ast.unparse(node) for node in found.decorator_list]


def test_every_known_class_computes_what_is_said_of_it() -> None:
    expected = source_of("mixtral.modeling_mixtral", "MixtralExperts")
    assert "self.act_fn(gate) * up" in expected[0] and expected[1] == {"__init__", "forward"}
    assert expected[2] == ["use_experts_implementation"]
    for module, class_name in PACKED_EXPERTS.items():
        assert source_of(module, class_name) == expected, module


def test_the_report_names_experts_and_what_is_left() -> None:
    model = MIXTRAL.build("dense")
    report = peftkern.quantize_(model, peftkern.QuantConfig("nf4"))
    assert report.skipped["model.layers.1.mlp.experts"] == "packed experts, which only exist dense"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert patch(adapted).reasons["packed experts, no adapter"] == 2
    report = patch(mixtral())
    [row, _] = [row for row in report.rows if row.module.endswith("experts")]
    assert (row.kind, row.weight) == ("lora.ParamWrapper", "4 experts, float32 192×64")
    assert report.reasons[ON_A_PARAMETER] == 2  # the routers


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("parameters", [["experts.gate_up_proj"], ["experts.down_proj"]])
def test_one_adapted_parameter_and_any_activation(activation: str, parameters: list[str]) -> None:
    model = mixtral({"hidden_act": activation}, target_modules=["q_proj"], target_parameters=parameters)
    expected = run(model, BATCH)
    patch(model, strict=True)
    assert_same_run(model, BATCH, expected)
    assert len(patched_experts(model)) == 2
    assert not patch(model).rows[0].calls_left


def test_another_model_with_more_experts_for_each_token() -> None:
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        **{**MIXTRAL.sizes, "num_local_experts": 6}, num_experts_per_tok=3, moe_intermediate_size=40
    )
    model = transformers.Qwen3MoeForCausalLM(config).train()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": names, "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, **options))
    expected = run(model, BATCH)
    patch(model, strict=True)
    assert len(patched_experts(model)) == 2
    assert_same_run(model, BATCH, expected)
    assert verify(model, BATCH).ok


def test_no_tensor_of_the_size_of_all_experts_is_made() -> None:
    class Shapes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "detach" not in str(func):
                self.made.add(tuple(result.shape))
            return result

    def shapes(model: nn.Module) -> set[tuple[int, ...]]:
        with Shapes() as recorded:
            model(**BATCH).loss.backward()
        return recorded.made

    model = mixtral()
    packed = {tuple(p.shape) for p in experts_of(model).get_base_layer().parameters()}
    assert packed <= shapes(copy.deepcopy(model))
    patch(model)
    assert not packed & shapes(model)


def test_gradient_checkpointing() -> None:
    model = mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = run(model, BATCH)
    patch(model)
    assert_same_run(model, BATCH, expected)


def test_disabling_merging_and_the_way_back() -> None:
    model = mixtral()
    original, before = run(model, BATCH), {name: type(module) for name, module in model.named_modules()}
    with model.disable_adapter():
        alone = model(**BATCH).logits.detach()
    patch(model)
    with model.disable_adapter():
        assert error(model(**BATCH).logits.detach(), alone) <= DEEP
    model.merge_adapter()
    assert error(model(**BATCH).logits.detach(), original[0]) <= DEEP
    model.unmerge_adapter()
    assert_same_run(model, BATCH, original, 4 * DEEP)
    copied = copy.deepcopy(model)
    assert len(patched_experts(copied)) == 2
    assert unpatch(model) > 0
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_what_the_fused_product_does_not_cover_runs_as_before(caplog: pytest.LogCaptureFixture) -> None:
    model = mixtral()
    expected = run(model, BATCH)
    patch(model)
    calls: list[int] = []
    handle = experts_of(model).get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        assert_same_run(model, BATCH, expected)
    assert calls == [1] and "the experts have hooks" in caplog.text
    handle.remove()
    [row, _] = [row for row in patch(model).rows if row.module.endswith("experts")]
    assert row.calls_left == {"the experts have hooks, which the fused product would skip": 1}
    experts_of(model).get_base_layer().down_proj.requires_grad_(True)
    assert "trained itself" in " ".join(patch(model).reasons)
