"""The fused operations keep what the gradients that are asked for need, and compute nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from select_models import error, llama
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peftkern
from peftkern.backends import registry
from peftkern.formats import BitMask
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.lora_linear import Adapters, lora_linear
from peftkern.ops.lora_linear_group import Member, lora_linear_group
from peftkern.ops.masked_linear import masked_linear
from peftkern.ops.silu_mul import silu_mul
from peftkern.ops.sparse_delta_linear import sparse_delta_linear
from peftkern.select.execution import Execution

TOKENS, IN, OUT, RANK = 5, 12, 8, 3


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


MATRICES = {"weight": (OUT, IN), "A": (RANK, IN), "B": (OUT, RANK), "bias": (OUT,)}
MASK = BitMask.from_mask(torch.rand(OUT, IN, generator=torch.Generator().manual_seed(2)) < 0.5)
INDICES = SparseIndices.from_mask(torch.rand(OUT, IN, generator=torch.Generator().manual_seed(3)) < 0.2)


def run_plain(t: dict[str, Tensor]) -> Tensor:
    return lora_linear(t["x"], t["weight"], t["A"], t["B"], 2.0, t["bias"])


def run_masked(t: dict[str, Tensor]) -> Tensor:
    return masked_linear(t["x"], t["weight"], MASK, t["A"], t["B"], 2.0, t["bias"])


def run_sparse(t: dict[str, Tensor]) -> Tensor:
    return sparse_delta_linear(t["x"], t["weight"], [t["values"]], [INDICES], [1.0], t["A"], t["B"], 2.0, t["bias"])


def run_gated(t: dict[str, Tensor]) -> Tensor:
    return gated_lora_linear(t["gate"], t["up"], t["weight"], t["A"], t["B"], 2.0, t["bias"])


def run_gated_sparse(t: dict[str, Tensor]) -> Tensor:
    sparse: dict[str, Any] = {"values": [t["values"]], "indices": [INDICES], "delta_scaling": [1.0]}
    return gated_lora_linear(t["gate"], t["up"], t["weight"], t["A"], t["B"], 2.0, t["bias"], **sparse)


def run_group(t: dict[str, Tensor]) -> Tensor:
    members = [Member(t["weight"], Adapters([t[f"A{i}"]], [t[f"B{i}"]], [2.0], [0.0], None), None) for i in range(2)]
    return torch.cat(lora_linear_group(t["x"], members), dim=-1)


X = {"x": (TOKENS, IN)}
GATE = {"gate": (TOKENS, IN), "up": (TOKENS, IN)}
PAIRS = {"A0": (RANK, IN), "B0": (OUT, RANK), "A1": (RANK, IN), "B1": (OUT, RANK)}

CASES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], Sequence[str]]] = {
    "lora_linear": (run_plain, X | MATRICES, ("x", "A", "B", "bias")),
    "masked_linear": (run_masked, X | MATRICES, ("x", "weight", "A", "B", "bias")),
    "sparse_delta_linear": (run_sparse, X | MATRICES | {"values": (len(INDICES),)}, ("x", "values", "A", "B")),
    "gated": (run_gated, GATE | MATRICES, ("gate", "up", "A", "B", "bias")),
    "gated, sparse": (run_gated_sparse, GATE | MATRICES | {"values": (len(INDICES),)}, ("gate", "up", "values", "B")),
    "group": (run_group, X | MATRICES | PAIRS, ("x", "A0", "B0", "A1", "B1")),
    "silu_mul": (lambda t: silu_mul(t["gate"], t["up"]), GATE, ("gate", "up")),
}


def needed(asked: set[str]) -> set[str]:
    """The activations that the gradients of ``asked`` are made of."""
    skinny = {name for name in asked if name[0] in "Av" or name == "weight"}  # A, values, weight: gradient times x
    kept = {"x"} if skinny else set()
    if skinny or "gate" in asked:
        kept |= {"gate", "up"}
    return kept | ({"gate"} if "up" in asked else set()) | ({"h"} if any(name[0] == "B" for name in asked) else set())


def cases() -> Iterator[tuple[str, frozenset[str]]]:
    for name, (_run, _shapes, trained) in CASES.items():
        for flags in product((False, True), repeat=len(trained)):
            asked = frozenset(n for n, flag in zip(trained, flags, strict=True) if flag)
            if asked:
                yield name, asked


def measured(name: str, asked: frozenset[str]) -> tuple[set[str], dict[str, Tensor]]:
    """What is kept where ``asked`` need gradients, and these."""
    run, shapes, _ = CASES[name]
    given = tensors(**shapes)
    for each in asked:
        given[each].requires_grad_()
    own = {tensor.data_ptr(): n for n, tensor in given.items()}
    kept: set[str] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(own.get(tensor.data_ptr(), "h"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(given)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    return kept, {n: gradient for n, t in given.items() if (gradient := t.grad) is not None}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_only_what_a_gradient_needs_is_kept_and_gradients_are_the_same(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTKERN_BACKEND", backend)
    for name, asked in cases():
        kept, gradients = measured(name, asked)
        activations = {"x", "gate", "up", "h"} & ({*CASES[name][1], "h"})
        assert kept & activations == needed(set(asked)) & activations, (name, asked)
        assert gradients.keys() == asked, (name, asked)
        _, everything = measured(name, frozenset(CASES[name][2]))
        for each in asked:
            assert torch.equal(gradients[each], everything[each]), (name, asked, each)


def test_compiled_graphs_keep_no_more() -> None:
    """The operators that tracing sees, as the eager functions."""
    given = tensors(**(X | MATRICES))
    for asked, sizes in (({"x"}, set()), ({"A"}, {(TOKENS, IN)}), ({"B"}, {(TOKENS, RANK)})):
        for name, tensor in given.items():
            tensor.requires_grad_(name in asked)
        kept: set[tuple[int, ...]] = set()

        def pack(tensor: Tensor, kept: set[tuple[int, ...]] = kept) -> Tensor:
            kept.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            arguments = (given["weight"], None, None, None, "dense", 0, 0, OUT, IN)
            lists = ([given["A"]], [given["B"]], [2.0], [0.0])
            y, _ = torch.ops.peftkern.lora_linear(given["x"], *arguments, *lists, None, None, None)
        assert kept - {(OUT, IN), (RANK, IN), (OUT, RANK)} == sizes
        y.sum().backward()
        assert {name for name, tensor in given.items() if tensor.grad is not None} == asked
        for tensor in given.values():
            tensor.grad = None


# ---- whole models


def test_backward_flops_are_those_of_the_selection() -> None:
    model = llama()
    batch = {"input_ids": torch.arange(3, 17).view(2, 7), "labels": torch.arange(3, 17).view(2, 7)}
    Execution(model).apply(["model.layers.1.mlp.up_proj.weight"])
    loss = model(**batch).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    tokens, hidden, inner, vocabulary = 14, 32, 48, 96
    head, down, up = tokens * vocabulary * hidden, tokens * inner * hidden, tokens * hidden * inner
    assert counter.get_total_flops() == 2 * (head + down + up)  # the gradient of the error twice, that of a weight once


def lora_model(patched: bool) -> Any:
    import peft

    from peftkern.nn import QuantizedLinear

    model = llama(hidden_size=64, intermediate_size=192, num_hidden_layers=3)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module, "nf4"))
    torch.manual_seed(2)
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    if patched:
        peftkern.patch(model, strict=True)
    return model


def test_a_patched_quantized_model_computes_the_selected_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": torch.arange(3, 17).view(2, 7), "labels": torch.arange(3, 17).view(2, 7)}
    plain, model = lora_model(False), lora_model(True)
    plain(**batch).loss.backward()
    calls: list[tuple[bool, tuple[bool, ...]]] = []
    original = registry.run

    def watched(operation: str, *arguments: Any, **options: Any) -> Any:
        if operation == "lora_linear_backward":
            calls.append((arguments[5], tuple(arguments[6])))
        return original(operation, *arguments, **options)

    execution = Execution(model)
    prefix = "base_model.model.model.layers.{}.{}.lora_{}.default.weight"
    chosen = [prefix.format(2, "self_attn.q_proj", "B"), prefix.format(2, "mlp.up_proj", "A")]
    monkeypatch.setattr(registry, "run", watched)
    for names in (chosen, [prefix.format(1, "mlp.down_proj", "A")], chosen[1:]):
        execution.apply(names)
        calls.clear()
        model(**batch).loss.backward()
        for name in names:
            assert error(model.get_parameter(name).grad, plain.get_parameter(name).grad) < 5e-5, name
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(names)
        model.zero_grad()
    # the last selection: down hands the error on; up has the gradient of its A alone; nothing else runs
    assert calls == [(True, (False, False)), (False, (True, False))]
