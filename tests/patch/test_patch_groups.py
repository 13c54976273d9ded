"""Layers that share their input run as one group where a backend has a form for it, and alone wherever that matters."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.hooks
import grouped_backend
import peft
import pytest
import torch
import torch.distributed
from patch_models import DEEP, TOLERANCE, error, fused_modules, llama, lora, run, text, twin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from peftkern.patch import patch, unpatch, verify
from peftkern.patch.shared_input import SIBLINGS, sibling_groups

FORWARD, BACKWARD = "lora_linear_group", "lora_linear_group_backward"
Calls = list[tuple[str, int]]
OF_STEP = sorted([(FORWARD, 3), (FORWARD, 2), (BACKWARD, 3), (BACKWARD, 2)] * 2)
"""What one step of a `llama` with adapters everywhere has to call."""


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of a backend that has a form for groups."""
    return grouped_backend.enter(monkeypatch)


def alone(model: nn.Module) -> Any:
    """A copy whose layers share nothing."""
    result = twin(model)
    for module in fused_modules(result).values():
        module.__dict__["_peftkern"].shared = None
    return result


def run_seeded(model: nn.Module, batch: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)
    return run(model, batch or text())


def assert_runs_alike(model: nn.Module, other: nn.Module) -> None:
    logits, gradients = run_seeded(model)
    expected_logits, expected_gradients = run_seeded(other)
    assert error(logits, expected_logits) <= DEEP
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert error(gradient, expected_gradients[name]) <= DEEP, name


class Attention(nn.Module):
    """Calls its layers in a given order, one of them perhaps with another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, features, bias=False) for features in (48, 32, 32))
        self.order = "qkv"

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        inputs = {"q": x, "k": x if other is None else other, "v": x if other is None else other}
        outputs = [getattr(self, f"{name}_proj")(inputs[name]) for name in self.order]
        return torch.cat(outputs, dim=-1).square().sum()


def unpatched_attention(order: str = "qkv", **options: Any) -> Any:
    torch.manual_seed(1)
    block = Attention()
    block.order = order
    lora(block, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    return block


def attention(order: str = "qkv", **options: Any) -> Any:
    """A patched block."""
    block = unpatched_attention(order, **options)
    patch(block, strict=True)
    return block


def state(layer: nn.Module) -> Any:
    return layer.__dict__["_peftkern"]


def gradients(block: nn.Module, x: Tensor, *rest: Any) -> dict[str, Tensor]:
    block.zero_grad()
    torch.manual_seed(5)
    loss = block(x, *rest)
    loss.backward()
    found = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_alike(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert error(results[name], value) <= TOLERANCE, name


# ---- what runs together


@pytest.mark.parametrize("base", ["dense", "bnb-nf4-double", "bnb-int8", "nf4"])
def test_a_model_gives_what_its_layers_give_alone(grouped: Calls, base: str) -> None:
    model = lora(llama(base), lora_dropout=0.3)
    patch(model, strict=True)
    assert_runs_alike(model, alone(model))
    assert sorted(grouped) == OF_STEP


@pytest.mark.parametrize(
    ("base", "model_dtype", "dtype"),
    [
        ("bnb-nf4", torch.bfloat16, torch.bfloat16),
        ("bnb-nf4", torch.float32, torch.float16),
        ("nf4", torch.float16, torch.float16),
        ("nf4", torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_and_autocast(grouped: Calls, base: str, model_dtype: torch.dtype, dtype: torch.dtype) -> None:
    model = lora(llama(base, dtype=model_dtype))
    patch(model, strict=True)
    blocks = [each.base_model.model.model.layers[0].self_attn for each in (model, alone(model))]
    x = torch.randn(2, 3, 64, dtype=model_dtype)
    with torch.autocast("cpu", dtype=dtype) if model_dtype != dtype else contextlib.nullcontext():
        outputs, expected = ([getattr(block, f"{name}_proj")(x) for name in "qkv"] for block in blocks)
    for y, truth in zip(outputs, expected, strict=True):
        assert y.dtype == truth.dtype
        assert error(y, truth) <= {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    assert grouped == [(FORWARD, 3)]


def test_a_layer_that_computes_in_another_dtype_runs_alone(grouped: Calls) -> None:
    model = lora(llama("bnb-nf4", dtype=torch.bfloat16))
    patch(model, strict=True)
    block = model.base_model.model.model.layers[0].self_attn
    block.k_proj.base_layer.compute_dtype = torch.float16
    x = torch.randn(2, 3, 64)
    separate = alone(block)
    for name in "qkv":
        y, expected = (getattr(each, f"{name}_proj")(x) for each in (block, separate))
        assert y.dtype == torch.float32
        assert error(y, expected) <= (2e-3 if name == "k" else 8e-3)
    assert grouped == [(FORWARD, 2)]
    assert state(block.v_proj).unused == 0


def test_several_adapters_of_different_ranks(grouped: Calls) -> None:
    model = lora(llama("nf4"), lora_dropout=0.3, rank_pattern={"k_proj": 7})
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    patch(model, strict=True)
    assert_runs_alike(model, alone(model))
    assert sorted(grouped) == OF_STEP


def test_biases_of_bases_and_adapters(grouped: Calls) -> None:
    model = lora(llama(), bias="lora_only", lora_bias=True)
    patch(model, strict=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    assert_runs_alike(model, alone(model))
    assert sorted(grouped) == OF_STEP


def test_layers_with_and_without_adapters(grouped: Calls) -> None:
    model = lora(llama("bnb-nf4"), target_modules=["q_proj", "v_proj"])
    patch(model, strict=True)
    assert_runs_alike(model, alone(model))
    assert sorted(grouped) == OF_STEP
    model = lora(llama(), target_modules=["q_proj", "v_proj"])
    patch(model, strict=True)
    grouped.clear()
    assert_runs_alike(model, alone(model))
    assert grouped == [(FORWARD, 2)] * 2 + [(BACKWARD, 2)] * 2


def test_a_layer_whose_output_needs_no_gradient_says_so(grouped: Calls) -> None:
    block = attention()
    block.k_proj.requires_grad_(False)
    x = torch.randn(3, 64)
    assert [getattr(block, f"{name}_proj")(x).requires_grad for name in "qkv"] == [True, False, True]
    assert grouped == [(FORWARD, 3)]


def test_nothing_waits_when_the_block_goes_on(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    patch(model)
    layer = model.base_model.model.model.layers[0]
    waiting: list[Any] = []

    def look(*_: Any) -> None:
        waiting.extend(state(m).shared._pending for m in (layer.self_attn.q_proj, layer.mlp.gate_proj))

    for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
        module.register_forward_pre_hook(look)
    model(**text())
    assert waiting == [None] * 4
    assert grouped == [(FORWARD, 3), (FORWARD, 2)] * 2


def test_verify_compares_what_the_groups_compute(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    patch(model)
    report = verify(model, text())
    assert report.ok, str(report)
    # outputs are compared in a pass of their own, where the original code of the two gated blocks calls its layers too
    outputs = [(FORWARD, 3), (FORWARD, 2), (FORWARD, 2)] * 2
    assert sorted(grouped) == sorted([*OF_STEP, *outputs])


# ---- adapters that come and go


def test_disabled_adapters_run_alone(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    patch(model)
    separate = alone(model)
    with model.disable_adapter(), separate.disable_adapter():
        assert torch.equal(model(**text()).logits, separate(**text()).logits)
    assert not grouped
    assert_runs_alike(model, separate)
    assert sorted(grouped) == OF_STEP


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.filterwarnings("ignore:merging into a quantized weight")
def test_merging_and_unmerging(grouped: Calls, base: str) -> None:
    model = lora(llama(base))
    patch(model)
    expected = run_seeded(model)[0]
    grouped.clear()
    model.merge_adapter()
    model(**text())
    assert not grouped
    model.unmerge_adapter()
    assert error(run_seeded(model)[0], expected) <= DEEP
    assert sorted(grouped) == OF_STEP


def test_another_adapter_is_used_at_once(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    lora_config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("other", lora_config)
    patch(model)
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        assert_runs_alike(model, alone(model))
    assert sorted(grouped) == sorted(OF_STEP * 2)


def test_generating(grouped: Calls) -> None:
    model = lora(llama("nf4")).eval()
    patch(model)
    ids = text(2, 4)["input_ids"]
    expected = alone(model).generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert not grouped
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)
    assert grouped == [(FORWARD, 3), (FORWARD, 2)] * 2 * 5
    assert not any(state(module).unused for module in fused_modules(model).values())


# ---- training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_dropout_again(grouped: Calls, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = lora(llama("nf4"), lora_dropout=0.4)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        patch(model, strict=True)
        grouped.clear()
        results.append(run_seeded(model))
    assert [name for name, _ in grouped].count(FORWARD) == 8
    assert error(results[1][0], results[0][0]) <= DEEP
    for name, gradient in results[0][1].items():
        assert error(results[1][1][name], gradient) <= DEEP, name


def test_several_forward_passes_before_the_backward_passes(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    patch(model)
    separate = alone(model)
    for each in (model, separate):
        losses = [each(**text(seed=seed)).loss for seed in (3, 4)]
        for loss in reversed(losses):
            loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), separate.parameters(), strict=True):
        if expected.grad is not None:
            assert error(parameter.grad, expected.grad) <= DEEP, name
    assert [name for name, _ in grouped].count(FORWARD) == 8


def test_distributed_training_reduces_every_gradient(grouped: Calls, tmp_path: Path) -> None:
    model = lora(llama("nf4"))
    patch(model)
    expected = run_seeded(alone(model))[1]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        found = run_seeded(wrapped)[1]
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == {f"module.{name}" for name in expected}
    assert all(error(found[f"module.{name}"], value) <= DEEP for name, value in expected.items())
    assert sorted(grouped) == OF_STEP


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_compiled_the_layers_run_alone(grouped: Calls, part: str) -> None:
    model = lora(llama("nf4"))
    patch(model, strict=True)
    block = model.base_model.model.model.layers[0].get_submodule(part)
    x = torch.randn(2, 3, 64)
    rest = {"position_embeddings": (torch.ones(1, 3, 16), torch.zeros(1, 3, 16)), "attention_mask": None}
    arguments = rest if part == "self_attn" else {}
    take = (lambda out: out[0]) if part == "self_attn" else (lambda out: out)
    eager = take(block(x, **arguments))
    assert len(grouped) == 1
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert error(take(compiled(x, **arguments)), eager) <= DEEP
    torch.compiler.reset()
    assert len(grouped) == 1
    assert state(block.get_submodule("q_proj" if part == "self_attn" else "up_proj")).unused == 0


# ---- hooks


def hooked(block: Any, kind: str, calls: list[str]) -> int:
    """Hang a hook on `k_proj`; how many layers still run as one."""

    def note(*_: Any) -> None:
        calls.append(kind)

    if kind == "forward":
        block.k_proj.register_forward_hook(note)
        return 3
    if kind == "pre":
        block.k_proj.register_forward_pre_hook(note)
    if kind == "backward":
        block.k_proj.register_full_backward_hook(note)
    if kind == "adapter":
        block.k_proj.lora_A["default"].register_forward_hook(note)
    if kind == "accelerate":
        real = block.k_proj.forward
        block.k_proj.forward = lambda x: (note(), real(x))[1]
    return 2


@pytest.mark.parametrize("order", ["qkv", "kqv"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "adapter", "accelerate"])
def test_a_hook_on_one_layer_runs_once_for_each_call(grouped: Calls, kind: str, order: str) -> None:
    block = attention(order)
    x = torch.randn(5, 64, requires_grad=True)
    expected = gradients(alone(block), x)
    calls: list[str] = []
    together = hooked(block, kind, calls)
    grouped.clear()
    assert_alike(gradients(block, x), expected)
    assert calls == [kind]
    assert grouped == [(FORWARD, together), (BACKWARD, together)]
    assert_alike(gradients(block, x), expected)
    assert not any(state(layer).unused for layer in (block.q_proj, block.k_proj, block.v_proj))


def test_a_hook_may_replace_the_input_and_the_output(grouped: Calls) -> None:
    block = attention()
    separate = alone(block)
    for each in (block, separate):
        each.k_proj.register_forward_pre_hook(lambda _module, arguments: (arguments[0] + 1,))
        each.v_proj.register_forward_hook(lambda _module, _arguments, output: output * 2)
    x = torch.randn(5, 64)
    assert_alike(gradients(block, x), gradients(separate, x))
    assert grouped == [(FORWARD, 2), (BACKWARD, 2)]


def test_a_hook_for_all_modules_may_replace_the_input(grouped: Calls) -> None:
    block = attention()
    separate = alone(block)

    def replace(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (arguments[0] + 1,) if module in (block.k_proj, separate.k_proj) else None

    x = torch.randn(5, 64)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(replace)
    try:
        assert_alike(gradients(block, x), gradients(separate, x))
    finally:
        handle.remove()
    assert grouped[0] == (FORWARD, 3)
    assert state(block.k_proj).unused == 1


def test_accelerates_hooks_on_the_layers(grouped: Calls) -> None:
    block = attention()
    x = torch.randn(5, 64)
    expected = gradients(alone(block), x)
    for layer in (block.q_proj, block.k_proj):
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert_alike(gradients(block, x), expected)
    assert not grouped


# ---- blocks that do not ask for every output


@pytest.mark.parametrize("order", ["qk", "k", "v", "kq", "kvq", "qqkv", "qvkq"])
def test_any_order_and_any_layers(grouped: Calls, order: str) -> None:
    block = attention(order)
    x = torch.randn(5, 64, requires_grad=True)
    separate = alone(block)
    for _ in range(3):
        assert_alike(gradients(block, x), gradients(separate, x))


def test_a_skipped_layer_dissolves_the_group(grouped: Calls, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleList([unpatched_attention(order) for order in ("qk", "qkv", "qk")])
    patch(model)
    separate = alone(model)
    x = torch.randn(5, 64)
    with caplog.at_level(logging.DEBUG, logger="peftkern"):
        for _ in range(4):
            for block, expected in zip(model, separate, strict=True):
                assert_alike(gradients(block, x), gradients(expected, x))
    # once for each block that skips a layer, every time for the one that does not
    assert [name for name, _ in grouped].count(FORWARD) == 2 + 4
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage().split(" ")[0] for record in warnings] == ["0.q_proj"]
    assert "runs alone from now on" in warnings[0].getMessage()
    report = patch(model)
    rows = {row.module: row for row in report.rows}
    assert {name: row.unused for name, row in rows.items() if row.unused} == {"0.v_proj": 1, "2.v_proj": 1}
    assert "outputs unused: 1, runs alone" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["rows"][2]["unused"] == 1
    assert [rows[f"0.{name}_proj"].kernel.partition("(")[2] for name in "qkv"] == ["group of 2)"] * 2 + [""]


def test_without_gradients_it_dissolves_as_well(grouped: Calls) -> None:
    block = attention("qk").eval()
    with torch.no_grad():
        for _ in range(3):
            block(torch.randn(5, 64))
    assert grouped == [(FORWARD, 3)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_it_dissolves_only_when_nothing_is_left_to_recompute(grouped: Calls, reentrant: bool, passes: int) -> None:
    block = attention("qk", lora_dropout=0.5)
    separate = alone(block)
    xs = [torch.randn(5, 64, requires_grad=True) for _ in range(passes)]
    forwards = []
    for _step in range(3):
        grouped.clear()
        for each in (block, separate):
            each.zero_grad()
        # dropout of a layer that nobody calls draws a number too, so that the two draw alike only when dissolved
        torch.manual_seed(5)
        losses = [checkpoint(block, x, use_reentrant=reentrant) for x in xs]
        for loss in reversed(losses):
            loss.backward()
        forwards.append([name for name, _ in grouped].count(FORWARD))
        checkpointed = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
        block.zero_grad()
        torch.manual_seed(5)
        if not state(block.q_proj).shared.dissolved:
            continue
        torch.manual_seed(5)
        losses = [separate(x) for x in xs]
        for loss in reversed(losses):
            loss.backward()
        for name, parameter in separate.named_parameters():
            if parameter.grad is not None:
                assert error(checkpointed[name], parameter.grad) <= TOLERANCE, name
    assert forwards == [2 * passes, 0, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_step_that_finds_out_has_the_right_gradients(grouped: Calls, reentrant: bool) -> None:
    block = attention("qk", lora_dropout=0.5)
    x = torch.randn(5, 64, requires_grad=True)
    expected = gradients(twin(block), x)
    block.zero_grad()
    torch.manual_seed(5)
    checkpoint(block, x, use_reentrant=reentrant).backward()
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected[name]), name


def test_keys_and_values_of_another_tensor(grouped: Calls) -> None:
    block = attention()
    separate = alone(block)
    x, other = torch.randn(5, 64, requires_grad=True), torch.randn(7, 64, requires_grad=True)

    def forward(self: Any, x: Tensor, other: Tensor) -> Tensor:
        parts = [self.q_proj(x), self.k_proj(other), self.v_proj(other)]
        return sum(part.square().sum() for part in parts)

    for _ in range(3):
        losses = [forward(each, x, other) for each in (block, separate)]
        found = [torch.autograd.grad(loss, (x, other)) for loss in losses]
        assert all(error(a, b) <= TOLERANCE for a, b in zip(*found, strict=True))
    assert grouped == [(FORWARD, 3), (BACKWARD, 3)]
    assert [state(getattr(block, f"{name}_proj")).unused for name in "qkv"] == [0, 1, 1]


# ---- what makes an output that waits useless


def switch_to_eval(layer: Any, _x: Tensor) -> None:
    layer.eval()


def scale(layer: Any, _x: Tensor) -> None:
    layer.scaling["default"] *= 2


def train_step(layer: Any, _x: Tensor) -> None:
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3)


def replace_factor(layer: Any, _x: Tensor) -> None:
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight * 2)


def change_weight(layer: Any, _x: Tensor) -> None:
    layer.base_layer.weight.mul_(2)


def freeze(layer: Any, _x: Tensor) -> None:
    layer.requires_grad_(False)


def change_x(_layer: Any, x: Tensor) -> None:
    x.mul_(2)


def train_x(_layer: Any, x: Tensor) -> None:
    x.requires_grad_()


@pytest.mark.parametrize(
    "change", [switch_to_eval, scale, train_step, replace_factor, change_weight, freeze, change_x, train_x]
)
def test_what_changed_between_two_calls_counts(grouped: Calls, change: Callable[[Any, Tensor], None]) -> None:
    block = attention(lora_dropout=0.0 if change is not switch_to_eval else 0.9)
    block.q_proj.requires_grad_(False)
    separate = alone(block)
    x = torch.randn(5, 64)
    with torch.no_grad():
        block.q_proj(x)
    block.q_proj(x)
    grouped.clear()
    own_x = x.clone()
    change(block.k_proj, x)
    change(separate.k_proj, own_x)
    result, y = block.k_proj(x), separate.k_proj(own_x)
    assert error(result, y) <= TOLERANCE
    assert result.requires_grad == y.requires_grad
    assert not grouped


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
@pytest.mark.parametrize("inside_first", [False, True])
def test_two_calls_in_different_contexts(grouped: Calls, context: Callable[[], Any], inside_first: bool) -> None:
    block = attention()
    separate = alone(block)
    x = torch.randn(5, 64)
    contexts = [context(), contextlib.nullcontext()]
    first, second = contexts if inside_first else contexts[::-1]
    with first:
        block.q_proj(x)
    with second:
        y, expected = block.k_proj(x), separate.k_proj(x)
    assert (y.dtype, y.requires_grad, y.is_inference()) == (
        expected.dtype,
        expected.requires_grad,
        expected.is_inference(),
    )
    assert error(y, expected) <= 8e-3
    assert grouped == [(FORWARD, 3)]


def test_tensors_of_inference_mode_keep_no_count_and_run_alone(grouped: Calls) -> None:
    block = attention().eval()
    separate = alone(block)
    with torch.inference_mode():
        x = torch.randn(5, 64)
        block.q_proj(x)
        x.mul_(2)
        assert error(block.k_proj(x), separate.k_proj(x)) <= TOLERANCE
    assert not grouped


def test_an_equal_tensor_is_not_the_same(grouped: Calls) -> None:
    block = attention()
    x = torch.randn(5, 64)
    y = block.q_proj(x)
    block.k_proj(x.clone())
    assert y.shape == (5, 48)
    assert state(block.k_proj).unused == 1
    assert error(block.v_proj(x), alone(block).v_proj(x)) <= TOLERANCE
    assert len(grouped) == 1


def test_an_output_is_useless_once_its_graph_is_gone(grouped: Calls) -> None:
    block = attention()
    separate = alone(block)
    x = torch.randn(5, 64, requires_grad=True)
    for each in (block, separate):
        each.q_proj(x).sum().backward()
        each.k_proj(x).sum().backward()
    assert error(block.k_proj.lora_B["default"].weight.grad, separate.k_proj.lora_B["default"].weight.grad) <= TOLERANCE


def test_outputs_may_be_modified_in_place(grouped: Calls) -> None:
    block = attention()
    separate = alone(block)
    x = torch.randn(5, 64)
    block.q_proj(x).zero_()
    y = block.k_proj(x)
    y.mul_(2)
    assert error(y, 2 * separate.k_proj(x)) <= TOLERANCE
    assert error(block.v_proj(x), separate.v_proj(x)) <= TOLERANCE
    assert grouped == [(FORWARD, 3)]


# ---- copies, and layers that go


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_have_groups_of_their_own(grouped: Calls, duplicate: Callable[[Any], Any]) -> None:
    block = attention()
    x = torch.randn(5, 64)
    block.q_proj(x)
    copied = duplicate(block)
    assert state(copied.q_proj).shared is state(copied.v_proj).shared
    assert state(copied.q_proj).shared._pending is None
    assert state(copied.q_proj).shared.layers() == [copied.q_proj, copied.k_proj, copied.v_proj]
    grouped.clear()
    assert_alike(gradients(copied, x), gradients(alone(block), x))
    assert grouped == [(FORWARD, 3), (BACKWARD, 3)]
    block.k_proj(x)
    assert state(block.k_proj).unused == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_the_copy_of_one_layer_runs_alone(grouped: Calls, duplicate: Callable[[Any], Any]) -> None:
    block = attention()
    copied = duplicate(block.k_proj)
    gc.collect()
    assert state(copied).shared.layers() == [copied]
    x = torch.randn(5, 64)
    y = copied(x)
    assert not grouped
    assert error(block.k_proj(x), y) <= TOLERANCE


def test_a_replica_that_shares_the_state_runs_alone(grouped: Calls) -> None:
    block = attention()
    replica = copy.copy(block.q_proj)  # as nn.DataParallel makes them
    assert state(replica) is state(block.q_proj)
    x = torch.randn(5, 64)
    assert error(replica(x), alone(block).q_proj(x)) <= TOLERANCE
    assert not grouped


def test_a_layer_that_was_replaced_is_not_computed(grouped: Calls) -> None:
    block = attention()
    block.k_proj = nn.Linear(64, 32)
    gc.collect()
    gradients(block, torch.randn(5, 64))
    assert grouped == [(FORWARD, 2), (BACKWARD, 2)]


def test_unpatching_drops_what_waits(grouped: Calls) -> None:
    block = attention()
    x = torch.randn(5, 64)
    block.q_proj(x)
    shared = state(block.v_proj).shared
    unpatch(block.k_proj)
    assert shared._pending is None
    grouped.clear()
    gradients(block, x)
    assert grouped == [(FORWARD, 2), (BACKWARD, 2)]
    unpatch(block)
    assert not fused_modules(block)
    gradients(block, x)
    assert len(grouped) == 2


def test_patching_again_forms_the_groups_anew(grouped: Calls) -> None:
    block = attention()
    x = torch.randn(5, 64)
    block.q_proj(x)
    before = state(block.q_proj).shared
    patch(block)
    after = state(block.q_proj).shared
    assert after is not before and after is state(block.v_proj).shared
    assert after._pending is None
    gradients(block, x)
    assert grouped[1:] == [(FORWARD, 3), (BACKWARD, 3)]


def test_a_layer_patched_again_by_itself_runs_alone(grouped: Calls) -> None:
    block = attention()
    patch(block.k_proj, kernels="reference")
    x = torch.randn(5, 64)
    assert_alike(gradients(block, x), gradients(alone(block), x))
    assert grouped == [(FORWARD, 2), (BACKWARD, 2)]


# ---- the report


def kernels(report: Any) -> set[str]:
    return {row.kernel for row in report.fused if row.kernel.startswith("lora_linear")}


def test_the_report_names_the_groups(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    report = patch(model)
    assert {row.kernel.partition("(")[2] for row in report.fused} == {"group of 3)", "group of 2)", ""}
    lines = [line for line in str(report).splitlines() if "k_proj" in line]
    assert len(lines) == 1 and "lora_linear on cpu (group of 3)" in lines[0]
    for adapter in ("q_proj", "v_proj"):
        assert sum("group of 3" in row.kernel for row in report.rows if row.module.endswith(adapter)) == 2
    with model.disable_adapter():
        assert not any("group" in kernel for kernel in kernels(patch(model)))


def test_forced_kernels_without_a_form_for_groups_run_alone(grouped: Calls) -> None:
    model = lora(llama("nf4"))
    assert kernels(patch(model, kernels="reference")) == {"lora_linear on reference"}
    run_seeded(model)
    assert not grouped


def test_without_such_a_backend_nothing_is_grouped() -> None:
    model = lora(llama("nf4"))
    report = patch(model)
    assert not any("group" in row.kernel for row in report.rows)
    separate = alone(model)
    for _ in range(2):
        (logits, found), (expected_logits, expected) = run_seeded(model), run_seeded(separate)
        assert torch.equal(logits, expected_logits)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(state(module).unused for module in fused_modules(model).values())


# ---- which layers belong together


def test_siblings_are_known_by_name() -> None:
    attention, mlp = "layers.0.self_attn", "layers.0.mlp"
    names = [f"{attention}.{name}_proj" for name in "oqkv"] + [f"{mlp}.{name}_proj" for name in ("down", "up", "gate")]
    assert sibling_groups(dict.fromkeys(names, 64)) == [
        tuple(f"{attention}.{name}_proj" for name in "qkv"),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
    ]
    assert sibling_groups(dict.fromkeys(["query", "value", "layer.query"], 8)) == [("query", "value")]


def test_siblings_have_equally_many_inputs() -> None:
    assert sibling_groups({"a.q_proj": 64, "a.k_proj": 32, "a.v_proj": 64}) == [("a.q_proj", "a.v_proj")]
    assert sibling_groups({"a.q_proj": 64, "a.k_proj": 32, "a.v_proj": 32}) == []


@pytest.mark.parametrize("block", ["encoder_attn", "crossattention.self", "cross_attn", "EncDecAttention"])
def test_attention_to_another_sequence_is_not_grouped(block: str) -> None:
    names = [f"layers.0.{block}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert sibling_groups(dict.fromkeys(names, 64)) == []
    assert len(sibling_groups(dict.fromkeys([name.replace(block, "cross_encoder") for name in names], 64))) == 1


HOMES = {
    "q_proj": ("llama.modeling_llama", "LlamaAttention"),
    "query": ("bert.modeling_bert", "BertSelfAttention"),
    "q": ("t5.modeling_t5", "T5Attention"),
    "q_lin": ("distilbert.modeling_distilbert", "DistilBertSelfAttention"),
    "query_proj": ("deberta_v2.modeling_deberta_v2", "DisentangledSelfAttention"),
    "linear_q": ("wav2vec2_conformer.modeling_wav2vec2_conformer", "Wav2Vec2ConformerSelfAttention"),
    "q_a_proj": ("deepseek_v3.modeling_deepseek_v3", "DeepseekV3Attention"),
    "gate_proj": ("llama.modeling_llama", "LlamaMLP"),
    "wi_0": ("t5.modeling_t5", "T5DenseGatedActDense"),
    "w1": ("lfm2.modeling_lfm2", "Lfm2MLP"),
}


@pytest.mark.parametrize("row", SIBLINGS, ids="-".join)
def test_the_names_are_those_of_transformers(row: tuple[str, ...]) -> None:
    module, name = HOMES[row[0]]
    source = inspect.getsource(getattr(importlib.import_module(f"transformers.models.{module}"), name))
    assert all(f"self.{child} = " in source and f"self.{child}(" in source for child in row)


@pytest.fixture(autouse=True)
def _no_group_process_left() -> Iterator[None]:
    yield
    assert not torch.distributed.is_initialized()
