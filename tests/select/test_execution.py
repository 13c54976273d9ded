"""Execution: what is selected is trained as in a dense run, the rest stays and costs nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from saved_bytes import saved_inside
from select_models import batches, changed, error, llama, twin, values
from torch import Tensor, nn

from peftkern.nn import QuantizedLinear
from peftkern.optim import AdamW, AdamW8bit
from peftkern.select.execution import Execution

LAYERS = 4
CHOSEN = (
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.3.mlp.up_proj.weight",
    "model.layers.3.post_attention_layernorm.weight",
)


def deep(**changes: Any) -> Any:
    return llama(num_hidden_layers=LAYERS, **changes)


def lora(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(2)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def train(model: Any, optimizer: torch.optim.Optimizer, data: Iterable[dict[str, Tensor]]) -> None:
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_dense(model: Any, optimizer: torch.optim.Optimizer, data: Iterable[dict[str, Tensor]], names: Any) -> None:
    """All gradients are computed; those of others than ``names`` are dropped in front of the optimizer."""
    for batch in data:
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if name not in names:
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


# ---- what is trained


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_selected_train_as_in_a_dense_run_and_the_others_stay(make: Any, dtype: torch.dtype) -> None:
    data = batches(8)
    model, dense = deep().to(dtype), deep().to(dtype)
    optimizer, dense_optimizer = make(model.parameters()), make(dense.parameters())
    train(model, optimizer, data[:4])  # momentum of all of them
    train(dense, dense_optimizer, data[:4])
    before = values(model)
    Execution(model).apply(CHOSEN, optimizer)
    train(model, optimizer, data[4:])
    train_dense(dense, dense_optimizer, data[4:], CHOSEN)
    assert changed(model, before) == set(CHOSEN)
    assert changed(model, values(dense)) == set()  # bit for bit
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(CHOSEN)


def test_others_have_no_gradient_and_a_quarter_of_the_state() -> None:
    model = deep(hidden_size=64, intermediate_size=96)
    optimizer = adamw(model.parameters())
    train(model, optimizer, batches(1))
    name = "model.layers.0.mlp.up_proj.weight"
    frozen = model.get_parameter(name)
    model(**batches(1)[0]).loss.backward()
    optimizer.zero_grad(set_to_none=False)
    Execution(model).apply(CHOSEN, optimizer)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in CHOSEN)
    tensors = [value for value in optimizer.state[frozen].values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) < 2.1 * frozen.numel()
    train(model, optimizer, batches(1))
    assert all(p.grad is None for p in model.parameters())


# ---- what is skipped


def count_backwards(model: Any, batch: dict[str, Tensor]) -> Counter[int]:
    """How often the error passes through each layer: a hook fires where a layer's input has a gradient."""
    counts: Counter[int] = Counter()
    handles = []

    def watch(index: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _grad: counts.update([index]))

        return hook

    for index, layer in enumerate(layers_of(model)):
        handles.append(layer.register_forward_hook(watch(index)))
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return counts


def layers_of(model: Any) -> Any:
    return model.get_submodule("base_model.model.model.layers" if hasattr(model, "peft_config") else "model.layers")


@pytest.mark.parametrize("lowest", range(LAYERS))
@pytest.mark.parametrize("kind", ["full", "lora", "checkpointed", "checkpointed lora", "reentrant", "reentrant lora"])
def test_no_error_is_handed_on_and_nothing_is_kept_below_the_lowest_selected(kind: str, lowest: int) -> None:
    model: Any = deep()
    if kind.endswith("lora"):
        model = lora(model)
    full = twin(model)
    if kind.split()[0] in ("checkpointed", "reentrant"):
        arguments = {"use_reentrant": kind.startswith("reentrant")}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    names = [n for n, p in model.named_parameters() if p.requires_grad and f".layers.{lowest}.mlp.up_proj" in n]
    assert names
    Execution(model).apply(names)
    batch = batches(1)[0]
    calls: Counter[int] = Counter()
    for index, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    for index in range(lowest):
        with saved_inside(layers_of(model)[index]) as saved:
            model(**batch)
        assert saved.bytes == 0, index
    calls.clear()
    error_through = count_backwards(model, batch)
    if kind.startswith("reentrant"):
        # the input of the lowest region asks for a gradient inside of it, which hooks see or not by version
        assert error_through.keys() - {lowest} == set(range(lowest + 1, LAYERS))
    else:
        assert error_through == dict.fromkeys(range(lowest + 1, LAYERS), 1)
    recomputed = {index for index, count in calls.items() if count == 2}
    assert recomputed == (set(range(lowest, LAYERS)) if "full" not in kind and kind != "lora" else set())
    full(**batch).loss.backward()
    for name in names:
        gradient = model.get_parameter(name).grad
        assert gradient is not None and error(gradient, full.get_parameter(name).grad) < 1e-5


def test_regions_in_the_middle_are_recomputed_as_the_error_passes_through() -> None:
    model = deep()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    dense = deep()
    Execution(model).apply(names)
    batch = batches(1)[0]
    model(**batch).loss.backward()
    dense(**batch).loss.backward()
    for name in names:
        assert torch.equal(model.get_parameter(name).grad, dense.get_parameter(name).grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_hook_of_peft_on_the_embeddings_is_off_and_comes_back(reentrant: bool) -> None:
    model = deep()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = lora(model)
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    functions = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    assert hooks
    execution = Execution(model)
    execution.apply([name for name, _ in model.named_parameters() if "layers.3" in name and "lora_" in name])
    assert not model.get_input_embeddings()._forward_hooks
    execution.undo()
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks
    assert [layer._gradient_checkpointing_func for layer in layers_of(model)] == functions


def test_checkpointing_out_of_reach_keeps_its_hook_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = deep()
    model.enable_input_require_grads()
    model.model.gradient_checkpointing = True  # of a model that calls torch.utils.checkpoint by itself
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        Execution(model).apply(CHOSEN)
    assert model.get_input_embeddings()._forward_hooks
    assert "handed down" in caplog.text


def test_checkpointing_that_is_switched_on_later_is_found_by_the_next_apply() -> None:
    model = deep()
    execution = Execution(model)
    execution.apply(CHOSEN)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    execution.apply(CHOSEN)
    model(**batches(1)[0]).loss.backward()
    with saved_inside(model.model.layers[1]) as saved:
        model(**batches(1)[0])
    assert saved.bytes == 0


# ---- the state of what comes back


def test_parked_moments_are_those_of_eight_bits_and_go_on() -> None:
    torch.manual_seed(0)
    weight, parked = (nn.Parameter(torch.randn(64, 80)) for _ in range(2))
    parked.data.copy_(weight)
    kept, optimizer = adamw([weight]), adamw([parked])
    for _ in range(3):
        gradient = torch.randn(64, 80)
        weight.grad, parked.grad = gradient, gradient.clone()
        kept.step()
        optimizer.step()
    optimizer.park([parked])
    assert parked.grad is None
    state = optimizer.state[parked]
    assert {name: value.dtype for name, value in state.items() if name != "step"} == {
        "state1": torch.uint8,
        "state2": torch.uint8,
        "absmax1": torch.float32,
        "absmax2": torch.float32,
    }
    weight.grad, parked.grad = gradient, gradient.clone()
    before = weight.detach().clone()
    kept.step()
    optimizer.step()
    assert optimizer.state[parked]["step"] == 4
    assert error(optimizer.state[parked]["exp_avg"], kept.state[weight]["exp_avg"]) < 0.02
    assert error(parked.detach() - before, weight.detach() - before) < 0.03


def test_a_probe_of_a_parked_parameter_is_its_next_update() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = adamw([weight])
    for _ in range(2):
        weight.grad = torch.randn(64, 80)
        optimizer.step()
    optimizer.park([weight])
    weight.grad = torch.randn(64, 80)
    trial = weight.detach().clone()
    optimizer.probe_(weight, trial, weight.grad.clone(), optimizer.param_groups[0])
    assert optimizer.state[weight]["state1"].dtype == torch.uint8  # still parked
    optimizer.step()
    assert torch.equal(trial, weight.detach())


def test_what_is_not_parked_starts_anew() -> None:
    model = deep()
    optimizer = adamw(model.parameters())
    train(model, optimizer, batches(2))
    execution = Execution(model)
    execution.apply(CHOSEN, optimizer, parked=False)
    assert {id(p) for p in optimizer.state} == {id(model.get_parameter(name)) for name in CHOSEN}
    other = "model.layers.0.mlp.up_proj.weight"
    execution.apply([other], optimizer)
    train(model, optimizer, batches(1))
    assert optimizer.state[model.get_parameter(other)]["step"] == 1


def test_eight_bit_state_is_parked_as_it_is() -> None:
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = AdamW8bit([weight])
    weight.grad = torch.randn(64, 80)
    optimizer.step()
    before = {n: v.clone() if isinstance(v, Tensor) else v for n, v in optimizer.state[weight].items()}
    optimizer.park([weight])
    assert optimizer.state[weight].keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(optimizer.state[weight][n]), torch.as_tensor(v)) for n, v in before.items())


def test_rows_of_a_parked_parameter_can_move() -> None:
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = adamw([weight])
    weight.grad = torch.randn(64, 80)
    optimizer.step()
    moments = optimizer.state[weight]["exp_avg"].clone()
    optimizer.park([weight])
    optimizer.reindex(weight, torch.arange(63, -1, -1))
    assert error(optimizer.state[weight]["exp_avg"], moments.flip(0)) < 0.02
    assert "state1" not in optimizer.state[weight]


def test_parking_a_stranger_is_an_error_and_parks_nothing() -> None:
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = adamw([weight])
    weight.grad = torch.randn(64, 80)
    optimizer.step()
    with pytest.raises(ValueError, match="park: parameter is none that this optimizer trains"):
        optimizer.park([weight, nn.Parameter(torch.randn(3))])
    assert "exp_avg" in optimizer.state[weight] and weight.grad is not None


def test_parked_state_is_saved_and_loaded() -> None:
    def trained(interrupted: bool) -> dict[str, Tensor]:
        model = deep(hidden_size=64, intermediate_size=96)
        optimizer = adamw(model.parameters())
        train(model, optimizer, batches(2))
        Execution(model).apply(CHOSEN, optimizer)
        train(model, optimizer, batches(2))
        if interrupted:
            state, weights = optimizer.state_dict(), values(model)
            model = deep(hidden_size=64, intermediate_size=96)
            model.load_state_dict(weights)
            optimizer = adamw(model.parameters())
            optimizer.load_state_dict(state)
        Execution(model).apply([name for name, _ in model.named_parameters()], optimizer)
        train(model, optimizer, batches(2))
        return values(model)

    once, again = trained(False), trained(True)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_another_optimizer_forgets_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = deep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, batches(1))
    execution = Execution(model)
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        execution.apply(CHOSEN, optimizer)
        execution.apply(CHOSEN[:2], optimizer)
    assert len(optimizer.state) == 2
    assert caplog.text.count("AdamW forgets the state") == 1


# ---- models of many kinds


def test_undo_puts_everything_back() -> None:
    model = deep()
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    execution = Execution(model)
    execution.apply(CHOSEN)
    execution.apply([*CHOSEN[:1], "model.norm.weight"])
    assert model.model.norm.weight.requires_grad
    execution.undo()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert execution.names == ()


@pytest.mark.parametrize("alias", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_one_parameter_by_either_name(alias: str) -> None:
    model, dense = deep(), deep()
    execution = Execution(model)
    execution.apply([alias])
    assert execution.names == ("model.embed_tokens.weight",)
    batch = batches(1)[0]
    model(**batch).loss.backward()
    dense(**batch).loss.backward()
    assert torch.equal(model.get_parameter(alias).grad, dense.get_parameter(alias).grad)


def test_modules_to_save_are_trained_and_their_originals_cannot_be() -> None:
    model = lora(deep(tie_word_embeddings=False), modules_to_save=["lm_head"], target_modules=["q_proj"])
    copy = "base_model.model.lm_head.modules_to_save.default.weight"
    execution = Execution(model)
    execution.apply([copy])
    model(**batches(1)[0]).loss.backward()
    assert model.get_parameter(copy).grad is not None
    model.zero_grad()
    with pytest.raises(ValueError, match=r"original_module.weight cannot be trained: a copy of its module"):
        execution.apply(["base_model.model.lm_head.original_module.weight"])
    assert execution.names == (copy,)


def test_quantized_bases_stay_and_adapters_over_them_are_selected() -> None:
    model = deep()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module, "nf4"))
    model = lora(model)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.base_layer.weight is quantized \(torch.uint8\)"):
        Execution(model).apply(["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"])
    names = [name for name, p in model.named_parameters() if p.requires_grad and "layers.2." in name]
    optimizer = adamw(p for p in model.parameters() if p.requires_grad)
    before = values(model)
    Execution(model).apply(names, optimizer)
    train(model, optimizer, batches(2))
    assert changed(model, before) == set(names)


@pytest.mark.parametrize("how", ["disabled", "merged", "another"])
def test_adapters_out_of_use_cannot_be_trained(how: str) -> None:
    model = lora(deep())
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    if how == "merged":
        model.merge_adapter()
    elif how == "another":
        model.add_adapter("default2", peft.LoraConfig(r=2, target_modules="all-linear"))
        Execution(model).apply([name])
        model.set_adapter("default2")
    else:
        model.base_model.disable_adapter_layers()
    asked = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"lora_A.default.weight cannot be trained: adapter 'default' is merged, dis"):
        Execution(model).apply([name])
    assert [p.requires_grad for p in model.parameters()] == asked


# ---- errors


def test_what_cannot_be_done_is_named_and_changes_nothing() -> None:
    model = deep()
    execution = Execution(model)
    with pytest.raises(ValueError, match="names must hold at least one"):
        execution.apply([])
    with pytest.raises(ValueError, match="no parameter 'nonsense'"):
        execution.apply(["nonsense"])
    with pytest.raises(ValueError, match=r"the optimizer does not hold model.layers.2"):
        execution.apply(CHOSEN, adamw(model.lm_head.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_it_waits_for_the_end_of_an_update() -> None:
    model = deep()
    execution = Execution(model)
    model(**batches(1)[0]).loss.backward()
    with pytest.raises(RuntimeError, match="between updates"):
        execution.apply(CHOSEN)
    assert all(p.requires_grad for p in model.parameters())
    model.zero_grad(set_to_none=False)
    execution.apply(CHOSEN)


def test_sharded_parameters_are_named() -> None:
    model = deep()
    model.get_parameter(CHOSEN[0]).device_mesh = "2 processes"  # as a DTensor of FSDP2 has
    with pytest.raises(ValueError, match=r"layers.2.self_attn.k_proj.weight is sharded"):
        Execution(model).apply(CHOSEN)
