"""Language models whose loss is computed without logits: which are taken, and that they train as before."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from model_families import FAMILIES
from patch_models import ALORA, DEEP, OTHERS, TOLERANCE, VOCABULARY, error, gpt2, llama, llama_config, lora, text
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama import modeling_llama

from peftkern.nn import QuantizedLinear
from peftkern.patch import language_model, unpatch, verify
from peftkern.patch import patch as patch_all
from peftkern.patch.language_model import LANGUAGE_MODELS, NO_LOGITS, Tail, tail_of
from peftkern.select.flops import FlopCounter

STEPS = 20

patch = functools.partial(patch_all, logits=False)

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "cache", "inputs_embeds", "use_cache")
_CROSS = ("encoder_hidden_states", "encoder_attention_mask")
_SOFTCAP = """
if self.config.final_logit_softcapping is not None:
    logits = logits / self.config.final_logit_softcapping
    logits = torch.tanh(logits)
    logits = logits * self.config.final_logit_softcapping
"""


def class_of(module: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), LANGUAGE_MODELS[module].class_name)


def expected_tail(tail: Tail) -> str:
    """What follows the call of the base, in one spelling."""
    others = ["cache", "hidden_states", "attentions"] + ["cross_attentions"] * (tail.output.endswith("CrossAttentions"))
    fields = ", ".join(f"{name}=outputs.{name}" for name in others)
    return f"""
hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
logits = self.lm_head(hidden_states)
{_SOFTCAP if tail.softcap else ""}
loss = None
if labels is not None:
    loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
return {tail.output}(loss=loss, logits=logits, {fields})
"""


def in_one_spelling(statements: list[ast.stmt]) -> str:
    source = ast.unparse(ast.Module(statements, []))
    for old, new in (
        ("transformer_outputs", "outputs"),
        ("hidden_states = outputs.last_hidden_state\n", ""),
        ("slice_logits_to_keep(hidden_states,", "slice_logits_to_keep(outputs.last_hidden_state,"),
        (".contiguous()", ""),
        ("logits=logits, labels=labels, ", "logits, labels, "),
        ("vocab_size=", ""),
        ("self.vocab_size", "self.config.vocab_size"),
    ):
        source = source.replace(old, new)
    return source


def run(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one forward and backward; the gradients are cleared."""
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same_run(model: nn.Module, batch: dict[str, Any], expected: Any, tolerance: float = DEEP) -> None:
    """The model gives the loss and gradients of ``expected``, an earlier `run`."""
    loss, gradients = run(model, batch)
    assert loss.dtype == expected[0].dtype and error(loss, expected[0]) <= tolerance
    assert gradients.keys() == expected[1].keys()
    assert all(error(gradient, expected[1][name]) <= tolerance for name, gradient in gradients.items())


def test_logits_stay_unless_they_are_renounced() -> None:
    model = llama()
    patch_all(model)
    assert model(**text()).logits is not None
    assert patch(model).rows[-1].kind == "LlamaForCausalLM"
    assert model(**text()).logits is None
    assert patch_all(model).rows[-1].kind == "LlamaForCausalLM"


@pytest.mark.parametrize("module", LANGUAGE_MODELS)
def test_every_known_class_computes_what_is_said_of_it(module: str) -> None:
    model_class, tail = class_of(module), LANGUAGE_MODELS[module]
    function = ast.parse(textwrap.dedent(inspect.getsource(model_class.forward))).body[0]
    assert isinstance(function, ast.FunctionDef)
    statements = [s for s in function.body if not isinstance(s, ast.Expr)]
    first, rest = statements[0], statements[1:]
    # outputs = self.base(argument=argument, ..., **kwargs)
    assert isinstance(first, ast.Assign | ast.AnnAssign) and isinstance(first.value, ast.Call)
    assert ast.unparse(first.value.func) == f"self.{tail.base}"
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in first.value.keywords}
    given |= {ast.unparse(argument): ast.unparse(argument) for argument in first.value.args}
    assert given.pop(None) == "kwargs"
    assert all(name == value and name in _INPUTS + _CROSS for name, value in given.items())
    taken = {argument.arg for argument in function.args.args} - {"self", "labels", "logits_to_keep"}
    assert taken == set(given)
    expected = in_one_spelling(ast.parse(expected_tail(tail)).body)
    assert in_one_spelling(rest) == expected
    assert tail_of(model_class) is tail


# ---- the same training


def gpt_neox() -> Any:
    return FAMILIES["gpt_neox"].build("dense", attn_implementation="eager")


def quantized_head(double: bool) -> Any:
    base = llama("nf4")
    base.lm_head = QuantizedLinear.from_linear(base.lm_head, "nf4" if double else "int8", double_quant=double)
    return base


def two_adapters(**options: Any) -> Any:
    model = lora(llama(), target_modules=["lm_head", "down_proj"], **options)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, **options))
    model.base_model.set_adapter(["default", "other"])
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "llama under LoRA": lambda: lora(llama("bnb-nf4")),
    "llama with an nf4 head": lambda: lora(quantized_head(double=True)),
    "llama with an int8 head": lambda: lora(quantized_head(double=False)),
    "llama with LoRA on its head": lambda: lora(llama(), target_modules=["q_proj", "lm_head"]),
    "llama tied, with LoRA on its head": lambda: lora(llama(tied=True), target_modules=["lm_head"]),
    "llama tied, with tied LoRA": lambda: lora(llama(tied=True), target_modules=["lm_head"], ensure_weight_tying=True),
    "llama with LoRA on an nf4 head": lambda: lora(quantized_head(double=True), target_modules=["v_proj", "lm_head"]),
    "llama with two adapters on its head": two_adapters,
    "llama with a head trained in full": lambda: lora(llama(), modules_to_save=["lm_head"]),
    "gpt2": lambda: gpt2().train(),
    "gpt2 with LoRA on its head": lambda: lora(gpt2().train(), target_modules=["c_attn", "lm_head"], lora_dropout=0.0),
    "gemma2 with LoRA on its head": lambda: lora(FAMILIES["gemma2"].build("dense"), target_modules=["lm_head"]),
    "gpt_neox with LoRA on its head": lambda: lora(gpt_neox(), target_modules=["lm_head"], use_rslora=True),
    "qwen2 with LoRA on its head": lambda: lora(FAMILIES["qwen2"].build("dense"), target_modules=".*_proj|lm_head"),
    "gemma2": lambda: FAMILIES["gemma2"].build("dense"),
    "opt": lambda: FAMILIES["opt"].build("dense"),
    "gpt_neox": gpt_neox,
    "qwen2": lambda: FAMILIES["qwen2"].build("dense"),
}


def masked_text(seed: int = 3) -> dict[str, Tensor]:
    batch = text(2, 9, seed)
    batch["labels"][0, :5] = -100
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(STEPS):
        loss = model(**masked_text(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same(name: str) -> None:
    model, other = MODELS[name](), MODELS[name]()
    report = patch(model)
    row = report.rows[-1]
    assert (row.action, row.kernel) == ("fused", "linear_cross_entropy on cpu") and NO_LOGITS in row.reason
    assert verify(model, masked_text()).ok
    losses, expected = train(model), train(other)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] != losses[0]
    assert not patch(model).rows[-1].calls_left


@pytest.mark.parametrize("name", ["disabled", "merged", "merged, then disabled", "one active", "none active"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_adapters_of_a_head_come_and_go(base: str, name: str) -> None:
    def build() -> Any:
        if base == "nf4":
            return lora(quantized_head(double=True), target_modules=["lm_head"])
        return two_adapters()

    def change(model: Any) -> None:
        if "merged" in name:
            model.merge_adapter()
        if "disabled" in name:
            model.disable_adapter_layers()
        if "active" in name:
            model.base_model.set_adapter("default" if "one" in name else [])

    model, other = build(), build()
    report = patch(model)
    assert report.rows[-1].action == "fused"
    if base == "nf4" and "merged" in name:  # which only a patched model can
        patch_all(other)
    for each in (model, other):
        change(each)
        each.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    assert_same_run(model, masked_text(), run(other, masked_text()))
    left = patch(model).rows[-1].calls_left
    assert left == ({"the merged adapters of its head are disabled, which unmerges them": 1} if "then" in name else {})


def test_a_copy_of_the_head_that_is_disabled_is_not_used() -> None:
    model, expected = lora(llama(), modules_to_save=["lm_head"]), run(llama(), masked_text())[0]
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2.0)
    patch(model)
    trained = model(**masked_text()).loss
    with model.disable_adapter():
        assert error(model(**masked_text()).loss, expected) <= TOLERANCE
    assert error(trained, expected) > 1e-3


def test_dropout_in_front_of_a_head_is_that_of_a_linear_layer() -> None:
    results = []
    for logits in (True, False):
        model = two_adapters(lora_dropout=0.4)
        patch_all(model, logits=logits)
        torch.manual_seed(5)
        results.append(run(model, masked_text()))
    (loss, gradients), (expected, others) = results
    assert error(loss, expected) <= TOLERANCE
    assert all(error(gradient, others[name]) <= DEEP for name, gradient in gradients.items())
    assert error(loss, run(two_adapters(), masked_text())[0]) > 1e-3


def test_autocast_and_half_precision_under_lora_on_the_head() -> None:
    for autocast in (True, False):
        model = lora(llama(dtype=torch.float32 if autocast else torch.bfloat16), target_modules=["lm_head"])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = run(model, masked_text())
            patch(model)
            assert_same_run(model, masked_text(), expected, 5e-2)
        assert not patch(model).rows[-1].calls_left


@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": torch.tensor(17)},
        {"num_items_in_batch": 17},
        {"shift_labels": masked_text(8)["labels"]},
        {"ignore_index": 5},
        {"output_hidden_states": True},
        {"return_dict": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_arguments_of_the_loss_mean_what_they_meant(extra: dict[str, Any]) -> None:
    model = llama()
    batch = masked_text()
    if "ignore_index" in extra:
        batch["labels"][batch["labels"] == -100] = 5
    expected, expected_output = run(model, {**batch, **extra}), model(**batch, **extra)
    patch(model)
    assert_same_run(model, {**batch, **extra}, expected)
    output = model(**batch, **extra)
    assert type(output) is type(expected_output)
    assert [key for key in expected_output if key != "logits"] == list(output)
    assert not patch(model).rows[-1].calls_left


def test_positional_arguments() -> None:
    model, batch = llama(), masked_text()
    patch(model)
    loss = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    assert torch.equal(loss, model(**batch).loss)


def test_what_needs_logits_is_bit_identical() -> None:
    model, batch = gpt_neox(), masked_text()
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def outputs() -> list[Tensor]:
        trained = [
            model(**inputs).logits,
            model(**batch, logits_to_keep=9).logits,
            model(**batch, return_dict=False)[1],
        ]
        model.eval()
        evaluated = model(**batch)
        model.train()
        return [*trained, evaluated.loss, evaluated.logits]

    expected = outputs()
    patch(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))
    assert model(**batch).logits is None
    assert patch(model).rows[-1].calls_left == {"it is to return a tuple": 1}


def test_no_label_at_all_is_what_it_was() -> None:
    model, batch = llama(), masked_text()
    batch["labels"].fill_(-100)
    assert model(**batch).loss.isnan() and model(**batch, num_items_in_batch=3).loss == 0.0
    patch(model)
    assert model(**batch).loss.isnan() and model(**batch, num_items_in_batch=3).loss == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    patch(model)
    assert model(**masked_text()).loss.dtype == torch.float32
    assert verify(model, masked_text()).ok


def test_autocast() -> None:
    model = lora(llama())
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, masked_text())
        patch(model)
        assert_same_run(model, masked_text(), expected, 5e-2)


def test_checkpointing_accumulation_and_tied_weights() -> None:
    model = llama(tied=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def accumulated() -> dict[str, Tensor]:
        for seed in (1, 2):
            (model(**masked_text(seed)).loss / 2).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return gradients

    expected = accumulated()
    patch(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(error(gradient, expected[name]) <= DEEP for name, gradient in accumulated().items())


def test_a_trainer_trains_as_before(tmp_path: Any) -> None:
    """It looks at the signature of the forward, passes num_items_in_batch, and evaluates with logits."""

    def losses(patched: bool) -> tuple[list[float], float]:
        model = lora(llama())
        if patched:
            patch(model)
        data = [{name: value[0] for name, value in masked_text(seed).items()} for seed in range(8)]
        arguments = TrainingArguments(
            str(tmp_path / str(patched)),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            label_names=["labels"],
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return history, trainer.evaluate()["eval_loss"]

    (ours, evaluated), (theirs, expected) = losses(True), losses(False)
    assert ours == pytest.approx(theirs, rel=1e-4) and evaluated == pytest.approx(expected, rel=1e-5)


def test_ignored_tokens_cost_no_product_in_the_head() -> None:
    model, batch = llama(), text(2, 17)
    patch(model)

    def flops() -> float:
        with FlopCounter() as counter:
            model(**batch).loss.backward()
        model.zero_grad()
        return counter.total

    everything = flops()
    batch["labels"][:, 5:] = -100  # 4 of 16 predicted tokens remain in each row
    head = 3 * 2 * 64 * VOCABULARY
    assert everything - flops() == pytest.approx(2 * 12 * head, rel=0.02)


# ---- what is left


def reason_of(model: nn.Module) -> str:
    [row] = [row for row in patch(model).rows if row.kind.endswith(("ForCausalLM", "LMHeadModel"))]
    assert row.action == "left" and not row.wanted
    return row.reason


def test_heads_that_are_more_than_a_linear_layer_are_named() -> None:
    dora = lora(llama(), target_modules=["lm_head"], use_dora=True)
    assert "its head: adapter 'default' is DoRA's" in reason_of(dora)
    other = lora(llama(), target_modules=["lm_head"], **ALORA)
    assert "its head: adapter 'default' is a ALoraLinearVariant" in reason_of(other)
    tokens = lora(llama(tied=True), trainable_token_indices=[3, 5])
    assert "its head is a TrainableTokensWrapper, not a plain" in reason_of(tokens)
    hooked = llama()
    hooked.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    assert "its head has hooks" in reason_of(hooked)


@pytest.mark.parametrize("inner", ["modules_to_save.default", "base_layer", "lora_B.default"])
def test_hooks_within_a_head_are_named(inner: str) -> None:
    model = lora(llama(), modules_to_save=["lm_head"]) if "save" in inner else lora(llama(), target_modules=["lm_head"])
    model.get_submodule(f"base_model.model.lm_head.{inner}").register_forward_hook(lambda module, args, output: None)
    assert "hooks" in reason_of(model)


def test_other_losses_and_forwards_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class DoubledForCausalLM(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert "no forward that is known" in reason_of(DoubledForCausalLM(llama_config()))
    model = llama()
    model.loss_function = lambda **kwargs: torch.zeros(())
    assert "loss_function" in reason_of(model)
    replaced = llama()
    replaced.forward = replaced.forward
    assert "replaced on the instance" in reason_of(replaced)
    with monkeypatch.context() as context:
        context.setattr(modeling_llama.LlamaForCausalLM, "forward", lambda self: None)
        assert tail_of(modeling_llama.LlamaForCausalLM) is None


def test_what_happens_later_runs_the_original() -> None:
    model, batch = gpt_neox(), masked_text()
    expected = model(**batch)
    patch(model)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: None)
    output = model(**batch)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    handle.remove()
    assert patch(model).rows[-1].calls_left == {"its head has hooks, which the loss would skip": 1}
    assert model(**batch).logits is None


def test_a_wrong_loss_is_seen_by_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    patch(model)
    real = language_model.linear_cross_entropy
    monkeypatch.setattr(language_model, "linear_cross_entropy", lambda *args, **kw: 1.001 * real(*args, **kw))
    assert not verify(model, masked_text()).ok


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_the_way_back(how: Any) -> None:
    model = llama()
    expected, before = run(model, masked_text()), type(model)
    patch(model)
    copied = how(model)
    assert_same_run(copied, masked_text(), expected, TOLERANCE * 10)
    for each in (copied, model):
        assert type(each).__name__ == "LlamaForCausalLM" and type(each).__module__ == before.__module__
        assert inspect.signature(each.forward) == inspect.signature(llama().forward)
        assert unpatch(each) == 3 + OTHERS
        assert type(each) is before
        assert torch.equal(run(each, masked_text())[0], expected[0])
