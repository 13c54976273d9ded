"""Gated feed-forward blocks: which are taken, and that they compute what they computed before."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from patch_models import (
    OTHER_CLASSES,
    OTHERS,
    OTHERS_LEFT,
    TOLERANCE,
    assert_same_run,
    classes,
    error,
    fused_modules,
    llama,
    llama_config,
    lora,
    run,
    text,
)
from torch import Tensor, nn
from transformers import AutoConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from peftkern.patch import fused as fused_file
from peftkern.patch import patch, unpatch, verify
from peftkern.patch.gated import GATED_MLPS, is_gated_mlp
from peftkern.patch.verification import TOLERANCES

HIDDEN, INNER = 16, 24

FORWARDS = [
    ast.dump(ast.parse(source))
    for source in (
        "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\nreturn down_proj",
    )
]


def class_of(module: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{module}"), GATED_MLPS[module])
    return found


def tiny_block(block_class: Any, module: str) -> Any:
    """With SiLU, which some of these models do not have by default."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(module.split(".")[0]).get_text_config()
    config.hidden_size, config.intermediate_size = HIDDEN, INNER
    sizes = {"intermediate_size": INNER} if "intermediate_size" in inspect.signature(block_class).parameters else {}
    block = block_class(config, **sizes).train()
    block.act_fn = ACT2FN["silu"]
    return block


def run_block(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    y = block(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    gradients = [p.grad for p in (x, *block.parameters()) if p.grad is not None]
    block.zero_grad()
    return [y.detach(), *gradients]


def worst_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert all(a.dtype == e.dtype for a, e in zip(actual, expected, strict=True))
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("module", GATED_MLPS)
def test_every_known_class_computes_what_the_fused_forward_does(module: str) -> None:
    block_class = class_of(module)
    source = ast.parse(textwrap.dedent(inspect.getsource(block_class.forward))).body[0]
    assert isinstance(source, ast.FunctionDef)
    assert [argument.arg for argument in source.args.args] == ["self", "x"]
    assert ast.dump(ast.Module(source.body, [])) in FORWARDS
    assert is_gated_mlp(block_class)

    block, x = tiny_block(block_class, module), torch.randn(2, 5, HIDDEN)
    expected = run_block(block, x)
    assert len(expected) >= 5
    report = patch(block)
    assert (report.rows[0].module, report.rows[0].action) == ("", "fused")
    assert worst_error(run_block(block, x), expected) <= TOLERANCE
    assert unpatch(block) == 1
    assert worst_error(run_block(block, x), expected) == 0.0


def llama_block(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_block(LlamaMLP, "llama.modeling_llama").to(dtype)


# ---- models


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_blocks_over_any_layers(base: str, targets: Any) -> None:
    model = lora(llama(base), target_modules=targets)
    expected = run(model, text())
    report = patch(model)
    blocks = {row.module: row for row in report.fused if row.kind == "LlamaMLP"}
    assert list(blocks) == [f"base_model.model.model.layers.{i}.mlp" for i in range(2)]
    assert all(row.kernel.startswith("silu_mul on ") and row.weight == "" for row in blocks.values())
    assert_same_run(model, text(), expected)


def test_a_model_without_adapters_has_its_blocks_taken() -> None:
    model = llama()
    expected, was = run(model, text()), classes(model)
    assert patch(model).counts == {"fused": 2 + OTHERS, "left": 15 + OTHERS_LEFT}
    assert {type(m).__name__ for m in fused_modules(model).values()} - OTHER_CLASSES == {"LlamaMLP"}
    assert_same_run(model, text(), expected)
    assert unpatch(model) == 2 + OTHERS
    assert classes(model) == was


def test_other_activations_are_left_and_named() -> None:
    model = LlamaForCausalLM(llama_config(hidden_act="relu"))
    report = patch(model, strict=True)
    assert report.counts["fused"] == OTHERS
    assert report.reasons["the activation is ReLU, not SiLU or GELU"] == 2
    assert {type(m).__name__ for m in fused_modules(model).values()} <= OTHER_CLASSES


@pytest.mark.parametrize("activation", ["silu", "swish"])
def test_both_silu_classes_are_taken(activation: str) -> None:
    block = llama_block()
    block.act_fn = ACT2FN[activation]
    assert patch(block).rows[0].action == "fused"


def test_classes_with_another_forward_are_not_looked_at() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)  # type: ignore[no-any-return]

    class Renamed(LlamaMLP):
        pass

    doubled, renamed = tiny_block(Doubled, "llama.modeling_llama"), tiny_block(Renamed, "llama.modeling_llama")
    assert {row.kind for row in patch(doubled).rows} == {"Linear"}
    assert patch(renamed).counts["fused"] == 1
    assert isinstance(renamed, Renamed)


def test_replaced_forwards_and_classes_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(nn.Module):
        forward = LlamaMLP.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return x

    with monkeypatch.context() as context:
        context.setattr(LlamaMLP, "forward", forward)
        assert not is_gated_mlp(LlamaMLP)
    with monkeypatch.context() as context:
        context.setattr(modeling_llama, "LlamaMLP", Theirs)
        context.setattr(Theirs, "forward", forward)
        assert not is_gated_mlp(Theirs)
    assert is_gated_mlp(LlamaMLP)


def test_a_copy_that_is_trained_in_full_is_left() -> None:
    model = lora(llama(), target_modules=["q_proj"], modules_to_save=["mlp"])
    patch(model)
    assert not any("mlp" in name for name in fused_modules(model))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_kernels_are_what_the_blocks_use(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = llama(), []
    patch(model, kernels=kernels)
    real = fused_file.silu_mul
    monkeypatch.setattr(
        fused_file, "silu_mul", lambda g, u, activation, backend: (asked.append(backend), real(g, u))[1]
    )
    model(**text())
    assert asked == [None if kernels == "auto" else kernels] * 2


def test_verify_compares_the_blocks() -> None:
    model = lora(llama("bnb-nf4"))
    patch(model)
    report = verify(model, text())
    assert report.ok, str(report)
    rows = [row for row in report.rows if row.what == "output" and row.name.endswith(".mlp")]
    assert len(rows) == 2


def test_verify_sees_a_wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    patch(model)
    monkeypatch.setattr(fused_file, "silu_mul", lambda gate, up, activation, backend: gate.sigmoid() * up)
    report = verify(model, text())
    assert not report.ok
    assert report.worst.name.endswith(".mlp") or report.worst.what == "gradient"


# ---- blocks


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype(dtype: torch.dtype) -> None:
    block, x = llama_block(dtype), torch.randn(2, 5, HIDDEN, dtype=dtype)
    expected = run_block(copy.deepcopy(block).double(), x.double())
    before = run_block(block, x)
    patch(block)
    after = run_block(block, x)
    assert after[0].dtype == dtype
    # weights' gradients of half precision carry the rounding of PyTorch's own products
    assert worst_error([t.double() for t in after], expected) <= 2 * TOLERANCES[dtype]
    assert worst_error(after, before) <= 2 * TOLERANCES[dtype]


def test_two_tensors_are_kept_instead_of_three() -> None:
    block, x = llama_block(), torch.randn(7, HIDDEN)
    block.requires_grad_(False)
    block.gate_proj.weight.requires_grad_()
    block.up_proj.weight.requires_grad_()

    def inner_tensors() -> set[int]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            block(x)
        return {tensor.data_ptr() for tensor in kept if tensor.shape == (7, INNER)}

    assert len(inner_tensors()) == 3
    patch(block)
    assert len(inner_tensors()) == 2


# ---- the layer behind the gate


def _adapted_block(lora_dropout: float = 0.0, **options: Any) -> nn.Module:
    """The feed-forward block of a Llama, LoRA on its three layers."""
    model = lora(llama(), r=4, lora_dropout=lora_dropout, init_lora_weights=False, **options)
    return model.base_model.model.model.layers[0].mlp.train()


def _inner_tensors(block: nn.Module) -> int:
    """How many tensors as wide as the gate a forward pass keeps; each storage counts once."""
    width = block.gate_proj.out_features
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (width,) and tensor.shape[:-1].numel() == 7:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.randn(7, block.gate_proj.in_features))
    return len(kept)


def _gradients(block: nn.Module) -> list[Tensor]:
    torch.manual_seed(9)
    x = torch.randn(7, block.gate_proj.in_features, requires_grad=True)
    y = block(x)
    y.square().sum().backward()
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained)
    for parameter in trained:
        parameter.grad = None
    return [y.detach(), x.grad, *gradients]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_input_of_the_last_layer_is_not_kept(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    block = _adapted_block(dropout)
    expected = _gradients(block) if dropout == 0.0 else None
    patch(block)
    assert _inner_tensors(block) == 2
    together = _gradients(block)
    monkeypatch.setattr(fused_file, "_arguments_behind_gate", lambda *_: None)
    assert _inner_tensors(block) == 3
    for one, other in zip(together, _gradients(block), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(together, expected or together, strict=True):
        assert error(one, other) <= TOLERANCE


def test_hooks_on_the_last_layer_see_its_input() -> None:
    block, seen = _adapted_block(), []
    patch(block)
    expected = _gradients(block)
    block.down_proj.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    for one, other in zip(_gradients(block), expected, strict=True):
        assert torch.equal(one, other)
    assert seen == [(7, block.gate_proj.out_features)]


def test_global_hooks_see_the_last_layer() -> None:
    block, seen = _adapted_block(), []
    patch(block)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        _gradients(block)
    finally:
        handle.remove()
    assert block.down_proj in seen


def test_a_last_layer_without_running_adapters_runs_its_own_code() -> None:
    block = _adapted_block()
    expected = None
    for _ in range(2):
        block.down_proj.enable_adapters(False)
        y = block(torch.ones(2, block.gate_proj.in_features))
        assert expected is None or error(y.detach(), expected) <= TOLERANCE
        expected = y.detach()
        patch(block)


def test_hooks_on_the_activation_run_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    block.act_fn = nn.SiLU()
    expected, seen = run_block(block, x), []
    patch(block)
    block.act_fn.register_forward_hook(lambda *_: seen.append(1))
    actual = run_block(block, x)
    assert seen == [1]
    assert worst_error(actual, expected) == 0.0
    assert "the activation has hooks" in caplog.text
    row = patch(block).rows[0]
    assert (row.action, row.reason) == ("left", "the activation has hooks, which the fused product would skip")
    assert list(row.calls_left.values()) == [1]


def test_an_activation_replaced_after_patching_is_used() -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    patch(block)
    block.act_fn = nn.Tanh()
    assert torch.equal(block(x), LlamaMLP.forward(block, x))


def test_hooks_on_the_layers_run() -> None:
    block, seen = llama_block(), []
    patch(block)
    for name in ("gate_proj", "up_proj", "down_proj"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    block(torch.randn(2, HIDDEN))
    assert seen == ["gate_proj", "up_proj", "down_proj"]


def test_halves_of_different_dtypes_multiply_as_before() -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    block.gate_proj.register_forward_hook(lambda _module, _inputs, output: output.bfloat16())
    expected = run_block(block, x)
    patch(block)
    assert worst_error(run_block(block, x), expected) == 0.0
    assert list(patch(block).rows[0].calls_left) == ["gate_proj gives torch.bfloat16 and up_proj torch.float32"]


def test_accelerate_hooks_on_the_block_keep_it_out() -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    expected = run_block(block, x)
    accelerate.hooks.add_hook_to_module(block, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    row = patch(block).rows[0]
    assert row.action == "left" and "replaced on the instance" in row.reason
    assert worst_error(run_block(block, x), expected) == 0.0


def test_accelerate_hooks_on_the_layers_do_not() -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    expected = run_block(block, x)
    accelerate.hooks.add_hook_to_module(block.up_proj, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert patch(block).rows[0].action == "fused"
    assert worst_error(run_block(block, x), expected) <= TOLERANCE


def test_gradient_checkpointing() -> None:
    model = lora(llama())
    expected = run(model, text())
    model.gradient_checkpointing_enable()
    patch(model)
    assert_same_run(model, text(), expected)


def test_compiles_as_one_graph() -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    expected = run_block(block, x)
    patch(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert worst_error(run_block(compiled, x), expected) <= TOLERANCE


def through_pickle(block: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(block))
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_stay_patched(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    block, x = llama_block(), torch.randn(2, 5, HIDDEN)
    patch(block, kernels="reference")
    copied = duplicate(block)
    assert type(copied) is type(block)
    assert worst_error(run_block(copied, x), run_block(block, x)) == 0.0
    assert unpatch(copied) == 1 and type(copied) is LlamaMLP
