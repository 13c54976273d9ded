"""Attention blocks and decoder layers: which are taken, and that they compute what they computed before."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from typing import Any

import pytest
import torch
from patch_models import TOLERANCE, assert_same_run, error, fused_modules, llama, llama_config, lora, run, text
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from peftkern.backends import cpu
from peftkern.patch import attention, decoder_layer, patch, unpatch, verify
from peftkern.patch.attention import ATTENTIONS, rotary_kind
from peftkern.patch.decoder_layer import DECODER_LAYERS, is_decoder_layer
from peftkern.patch.verification import TOLERANCES

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the native module")

LONG = text(4, 100)  # enough numbers for every fused path to be taken


def class_of(key: str) -> Any:
    module, name = key.rsplit(".", 1)
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def definition(function: Any) -> ast.FunctionDef:
    source = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(source, ast.FunctionDef)
    return source


def statements(source: ast.FunctionDef) -> list[str]:
    body = source.body[1:] if ast.get_docstring(source) is not None else source.body
    return [ast.unparse(statement) for statement in body]


def only_translates_names(source: ast.FunctionDef) -> bool:
    names = [ast.unparse(decorator) for decorator in source.decorator_list]
    return all(name.startswith(f"deprecate_kwarg('{attention.RENAMED[0]}',") for name in names)


def names_interfaces(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == attention.INTERFACES


# ---- the tables


@pytest.mark.parametrize("key", ATTENTIONS)
def test_every_known_attention_asks_for_its_function_once(key: str) -> None:
    block_class = class_of(key)
    source = definition(block_class.forward)
    assert [ast.unparse(n) for n in ast.walk(source) if isinstance(n, ast.Attribute) and names_interfaces(n)] == [
        f"{attention.INTERFACES}.get_interface"
    ]
    assert only_translates_names(source) and rotary_kind(block_class) == ATTENTIONS[key]


@pytest.mark.parametrize("key", [key for key, kind in ATTENTIONS.items() if kind.is_ours])
def test_every_known_attention_turns_as_the_operation_does(key: str) -> None:
    block_class = class_of(key)
    source = definition(block_class.forward)
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Name) and node.id == attention.FUNCTION]
    assert len(calls) == 1

    theirs = inspect.unwrap(block_class.forward).__globals__[attention.FUNCTION]
    assert theirs.__module__ == block_class.__module__
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 5, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2))
    takes_parts = "rotary_dim" in inspect.getsource(theirs)
    angles = torch.randn(2, 5, 4 if takes_parts else 8, generator=generator)
    repeated = ATTENTIONS[key].interleaved and not ATTENTIONS[key].spread
    angles = angles.repeat_interleave(2, -1) if repeated else torch.cat((angles, angles), -1)
    notes: list[str] = []
    arguments = (q, k, angles.cos(), angles.sin())
    for ours, expected in zip(
        attention._turn(theirs, ATTENTIONS[key], None, notes.append, *arguments), theirs(*arguments), strict=True
    ):
        assert error(ours, expected) <= 1e-6
    wide = [tensor.bfloat16() if index < 2 else tensor for index, tensor in enumerate(arguments)]
    for ours, expected in zip(
        attention._turn(theirs, ATTENTIONS[key], None, notes.append, *wide), theirs(*wide), strict=True
    ):
        assert ours.dtype == expected.dtype
        assert error(ours, expected) <= (1e-6 if ATTENTIONS[key].promotes else 1e-2)
    assert not notes


@pytest.mark.parametrize("key", DECODER_LAYERS)
def test_every_known_decoder_layer_adds_before_its_norm(key: str) -> None:
    layer_class = class_of(key)
    source = definition(layer_class.forward)
    arguments = [argument.arg for argument in source.args.args]
    passed = [*arguments[2:], *([f"**{source.args.kwarg.arg}"] if source.args.kwarg else [])]
    lines = statements(source)
    assert lines[0] == "residual = hidden_states"
    assert lines[1] == "hidden_states = self.input_layernorm(hidden_states)"
    attended, rest = lines[2], lines[3:]
    call = ast.parse(attended).body[0]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    assert ast.unparse(call.targets[0]) == "(hidden_states, _)" and ast.unparse(call.value.func) == "self.self_attn"
    given = {keyword.arg or "**kwargs": ast.unparse(keyword.value) for keyword in call.value.keywords}
    assert given.pop("hidden_states") == "hidden_states" and not call.value.args
    assert given == {name: name.lstrip("*") for name in passed}
    assert rest == [
        "hidden_states = residual + hidden_states",
        "residual = hidden_states",
        f"hidden_states = self.{decoder_layer.BEHIND}(hidden_states)",
        "hidden_states = self.mlp(hidden_states)",
        "hidden_states = residual + hidden_states",
        "return hidden_states",
    ]
    assert only_translates_names(source) and is_decoder_layer(layer_class)


# ---- models

WITH_SUM = ("llama", "qwen3", "gemma", "mistral", "glm")
FAMILIES = (*WITH_SUM, "cohere", "gpt_neox", "olmo2")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "pad_token_id"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_what_they_computed(family: str) -> None:
    torch.manual_seed(1)
    options = {name: getattr(llama_config(), name) for name in SIZES}
    config = AutoConfig.for_model(family, **options, head_dim=16)
    model = lora(AutoModelForCausalLM.from_config(config).train())
    expected = run(model, LONG)
    report = patch(model)
    kernels = [row.kernel for row in report.fused]
    assert kernels.count("rotary and attention on cpu") == 2
    assert kernels.count("rms_norm with residual on cpu") == (2 if family in WITH_SUM else 0)
    assert_same_run(model, LONG, expected)
    assert not any(row.calls_left for row in patch(model).rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpatch_restores_every_bit(dtype: torch.dtype) -> None:
    model = lora(llama(dtype=dtype))
    before = model(**LONG).logits
    patch(model)
    assert 0 < error(model(**LONG).logits, before) <= 3 * TOLERANCES[dtype]
    unpatch(model)
    assert torch.equal(model(**LONG).logits, before)


def test_verify_sees_a_wrong_turn_and_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama())
    patch(model)
    assert verify(model, LONG).ok
    with monkeypatch.context() as context:
        context.setattr(attention, "rotary", lambda q, k, *_rest, **_options: (q, k))
        assert not verify(model, LONG).ok
    with monkeypatch.context() as context:
        real = decoder_layer.add_and_normalize
        context.setattr(decoder_layer, "add_and_normalize", lambda *a: (real(*a)[0], real(*a)[1] * 1.01))
        assert not verify(model, LONG).ok


def test_the_sum_is_kept_once_and_added_by_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sums = lora(llama()), []
    patch(model)
    real = decoder_layer.add_and_normalize
    monkeypatch.setattr(decoder_layer, "add_and_normalize", lambda *a: (sums.append(1), real(*a))[1])
    model(**LONG)
    assert len(sums) == 2
    model(**text())  # short: its own code
    assert len(sums) == 2


def test_hooks_on_the_norm_see_the_sum() -> None:
    model = lora(llama())
    patch(model)
    expected = model(**LONG).logits
    seen: list[Any] = []
    norm = model.base_model.model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    assert error(model(**LONG).logits, expected) <= TOLERANCE
    assert seen == [(torch.Size([4, 100, 64]),) * 2]


def test_hooks_on_layers_and_attention_run() -> None:
    model, seen = lora(llama()), []
    patch(model)
    for module in fused_modules(model).values():
        if type(module).__name__ in ("LlamaAttention", "LlamaDecoderLayer"):
            module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    model(**LONG)
    assert seen == ["LlamaAttention", "LlamaDecoderLayer"] * 2


def test_the_function_of_the_module_stays_and_a_replaced_one_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = llama(), []
    theirs = modeling_llama.apply_rotary_pos_emb
    patch(model)
    model(**LONG)
    assert modeling_llama.apply_rotary_pos_emb is theirs
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *a: (calls.append(1), theirs(*a))[1])
    model(**LONG)
    assert len(calls) == 2


def test_generation_with_a_cache() -> None:
    model = lora(llama()).eval()
    prompt = LONG["input_ids"][:2]
    expected = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    patch(model)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False), expected)


def test_gradient_checkpointing() -> None:
    model = lora(llama())
    expected = run(model, LONG)
    model.gradient_checkpointing_enable()
    patch(model)
    assert_same_run(model, LONG, expected)


def test_compiles_as_one_graph() -> None:
    model = llama()
    expected = model(**LONG).logits
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].self_attn, fullgraph=True, backend="aot_eager")
    x, angles = torch.randn(2, 5, 64), (torch.ones(2, 5, 16), torch.zeros(2, 5, 16))
    assert error(compiled(x, angles)[0], model.model.layers[0].self_attn(x, angles)[0]) <= TOLERANCE
    assert error(model(**LONG).logits, expected) <= TOLERANCE


def test_a_layer_whose_norm_is_not_taken_is_left_and_named() -> None:
    model = llama()
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(64)
    rows = {row.module: row for row in patch(model).rows}
    assert rows["model.layers.0"].action == "left"
    assert rows["model.layers.0"].reason == "no fused form of the norm behind its sum, LayerNorm"
    assert rows["model.layers.1"].action == "fused"
    patched = model.model.layers[1]
    patched.post_attention_layernorm = nn.LayerNorm(64)  # replaced after patching
    expected = model(**LONG).logits
    unpatch(model)
    assert error(expected, model(**LONG).logits) <= TOLERANCE
