"""Attention inside of patched blocks: masks of padded and packed rows, what is handed on and noted, and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_families import FAMILIES
from patch_models import DEEP, TOLERANCE, assert_same_run, error, llama, lora, run, text
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from peftkern.backends import cpu
from peftkern.patch import attention, patch, unpatch, verify
from peftkern.select.flops import FlopCounter

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the native module")

BATCH = text(2, 40)
KERNEL = "rotary and attention on cpu"
TURNING = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "mixtral")
ATTENDING = (*TURNING, "gpt2", "opt", "phi3", "roberta")
"""Families of which PyTorch's attention is the usual one and whose blocks are known; the former are turned by us."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who attended: "ours" or "theirs", call by call."""
    made: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (made.append(name), real(*args, **kwargs))[1]

    monkeypatch.setattr(attention, "attention", counted("ours", attention.attention))
    functional = nn.functional
    real = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted("theirs", real))
    return made


def padded(batch: dict[str, Tensor], lengths: tuple[int, ...] = (40, 25), left: bool = False) -> dict[str, Tensor]:
    places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    places = places.flip(1) if left else places
    mask = places < torch.tensor(lengths)[:, None]
    labels = batch["labels"].masked_fill(~mask, -100)
    return {**batch, "labels": labels, "attention_mask": mask.long()}


@pytest.mark.parametrize("kind", ["plain", "padded", "padded left", "packed"])
@pytest.mark.parametrize("name", ATTENDING)
def test_families_attend_as_they_did(name: str, kind: str, calls: list[str]) -> None:
    model = FAMILIES[name].with_lora("dense")
    batch = BATCH if kind in ("plain", "packed") else padded(BATCH, left=kind == "padded left")
    if kind == "packed":
        if name not in TURNING:
            pytest.skip("is not packed so")
        lengths = (11, 1, 20, 8)
        places = torch.cat([torch.arange(length) for length in lengths])
        batch = {name: x[:1] for name, x in BATCH.items()} | {"position_ids": places[None], "use_cache": False}
    expected = run(model, batch)
    report = patch(model, logits=True)
    assert [row.kernel for row in report.fused].count(KERNEL if name in TURNING else "attention on cpu") == 2
    calls.clear()
    assert_same_run(model, batch, expected)
    assert calls == ["ours"] * 2
    assert not any(row.calls_left for row in patch(model).rows)


def test_unpatched_blocks_attend_as_before(calls: list[str]) -> None:
    model = lora(llama())
    expected = model(**BATCH).logits
    patch(model)
    assert 0 < error(model(**BATCH).logits, expected) <= TOLERANCE
    unpatch(model)
    calls.clear()
    assert torch.equal(model(**BATCH).logits, expected) and calls == ["theirs"] * 2


def test_what_the_kernel_does_not_take_is_pytorchs_and_noted_once(
    calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = lora(llama())
    model.base_model.model.config.attention_dropout = 0.1
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    patch(model)
    for _ in range(2):
        model(**BATCH)
    assert calls == ["theirs"] * 4
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "attends as PyTorch does: its attention weights are dropped out" in warnings[0]
    left = [row.calls_left for row in patch(model).rows if row.kernel == KERNEL]
    assert left == [{"its attention weights are dropped out": 2}] * 2
    calls.clear()
    model.eval()(**BATCH)
    assert calls == ["ours"] * 2


def states(keys: int = 6, **options: Any) -> list[Tensor]:
    return [torch.randn(2, heads, tokens, 8, **options) for heads, tokens in ((4, 6), (2, keys), (2, keys))]


def attend(notes: list[str], *arguments: Any, **options: Any) -> Any:
    theirs = sdpa_attention.sdpa_attention_forward
    return attention._attend(theirs, None, lambda text, _: notes.append(text), *arguments, **options)


def test_calls_that_are_handed_on() -> None:
    notes: list[str] = []
    trained = torch.zeros(2, 1, 6, 6, requires_grad=True)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    for arguments, options, reason in (
        ((*states(), trained), {}, "the mask of its attention is trained"),
        ((*states(), torch.ones(6, 6, dtype=torch.bool)), {}, "the mask of its attention is torch.bool with 2 dim"),
        ((*states(9), None), {}, "6 queries meet 9 keys without a mask"),
        ((*states(), None), {"output_attentions": True}, "its attention is called with output_attentions"),
        ((*states()[:2], torch.randn(2, 2, 6, 4), None), {}, "values [2, 2, 6, 4]"),
    ):
        notes.clear()
        theirs = sdpa_attention.sdpa_attention_forward(module, *arguments, **options)
        ours = attention._attend(
            sdpa_attention.sdpa_attention_forward,
            None,
            lambda text, _: notes.append(text),
            module,
            *arguments,
            **options,
        )
        assert torch.equal(ours[0], theirs[0]) and len(notes) == 1 and reason in notes[0]
    notes.clear()
    across = (*states(9), None)
    theirs = sdpa_attention.sdpa_attention_forward(module, *across, is_causal=False)
    assert error(attend(notes, module, *across, is_causal=False)[0], theirs[0]) <= TOLERANCE
    one = [x[:, :, :1] if index == 0 else x for index, x in enumerate(states())]
    for quiet in ((*one, None), (*states(dtype=torch.float64), None)):  # nothing to gain; no kernel
        attend(notes, module, *quiet)
    assert notes == []


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_whole_sequences_see_each_other(name: str, calls: list[str]) -> None:
    model = FAMILIES[name].with_lora("dense")
    expected = run(model, FAMILIES[name].batch())
    assert [row.kernel for row in patch(model).fused].count("attention on cpu") == 2
    calls.clear()
    assert_same_run(model, FAMILIES[name].batch(), expected)
    assert calls == ["ours"] * 2


def test_a_block_that_neither_turns_nor_attends_is_left() -> None:
    model = FAMILIES["gpt2"].with_lora("dense", config={"attn_implementation": "eager"})
    reasons = [row.reason for row in patch(model).left if row.kind == "GPT2Attention"]
    assert reasons == ["does not attend by 'sdpa'"] * 2


def test_other_attentions_stay(calls: list[str]) -> None:
    model = FAMILIES["llama"].with_lora("dense", config={"attn_implementation": "eager"})
    expected = run(model, BATCH)
    assert [row.kernel for row in patch(model, logits=True).fused].count("rotary on cpu") == 2
    assert_same_run(model, BATCH, expected)
    model.set_attn_implementation("sdpa")
    model(**BATCH)
    assert calls == ["ours"] * 2


def test_a_replaced_function_is_called(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    from transformers import AttentionInterface

    model, seen = llama(), []
    patch(model)
    theirs = sdpa_attention.sdpa_attention_forward
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", lambda *a, **k: (seen.append(1), theirs(*a, **k))[1]
    )
    model(**BATCH)
    assert len(seen) == 2 and "ours" not in calls


def test_verify_sees_a_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama())
    patch(model)
    assert verify(model, padded(BATCH)).ok
    real = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **k: real(*a, **k) * 1.01)
    assert not verify(model, BATCH).ok


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, calls: list[str]) -> None:
    model = lora(llama())
    model.enable_input_require_grads()
    expected = run(model, padded(BATCH))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    patch(model)
    calls.clear()
    assert_same_run(model, padded(BATCH), expected)
    assert calls == ["ours"] * 4


def test_autocast_attends_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dtypes = lora(llama()), []
    real = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, *a, **k: (dtypes.append(q.dtype), real(q, *a, **k))[1])
    turned, turn = [], attention.rotary
    monkeypatch.setattr(attention, "rotary", lambda *a, **k: (turned.append(1), turn(*a, **k))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**BATCH).logits
        patch(model)
        actual = model(**BATCH).logits
    assert dtypes == [torch.bfloat16] * 2 and len(turned) == 2
    assert error(actual, expected) <= 2e-2


def test_flops_are_those_of_pytorchs_attention() -> None:
    model = llama()
    block, x, angles = (
        model.model.layers[0].self_attn,
        torch.randn(2, 20, 64, requires_grad=True),
        torch.randn(2, 20, 16),
    )

    def flops() -> float:
        with FlopCounter() as counter:
            block(x, (angles.cos(), angles.sin()))[0].sum().backward()
        return counter.total

    theirs = flops()
    patch(model)
    # the turn of queries and keys is counted by its elements, with and without
    assert abs(flops() - theirs) <= 0.02 * theirs


def test_generation_with_padding() -> None:
    model = lora(llama()).eval()
    batch = padded(BATCH, left=True)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(
        **prompt, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    patch(model)
    actual = model.generate(
        **prompt, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert max(map(error, actual.scores, expected.scores)) <= DEEP
