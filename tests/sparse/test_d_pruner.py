"""D-Pruner: its importances against brute force and by hand, its masks, and what it leaves of a model."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sparse_models import error, llama, lora, outputs, text
from torch import Tensor, nn

from peftkern import patch
from peftkern.formats.bit_mask import largest_mask
from peftkern.nn import QuantizedLinear
from peftkern.sparse import linear_layers, mask_layers, masks
from peftkern.sparse.d_pruner import DPruner, dual_importance, general_importance, inverse_diagonal
from peftkern.sparse.layers import base_layer

GENERAL = [text(seed=seed) for seed in range(10, 14)]
DOMAIN = [text(seed=seed) for seed in range(20, 23)]


class Regression(nn.Module):
    """½ Σ (W x - y)² over the rows of a batch; no bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data = weight.clone()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=0.5 * (self.layer(x) - y).square().sum())


def bits(pruner: DPruner) -> dict[str, Tensor]:
    return {name: mask.mask() for name, mask in pruner.masks.items()}


def pruned(model: nn.Module, general: Any = GENERAL, domain: Any = DOMAIN, **options: Any) -> DPruner:
    pruner = DPruner(model, **options)
    if pruner.regularization > 0:
        pruner.collect_general(general)
    pruner.collect(domain)
    return pruner


# ---- general importance


def test_general_importance_is_the_error_of_the_best_compensation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    importance = general_importance(weight, inverse_diagonal(x.t() @ x, damping=0.0))
    for row, dropped in itertools.product(range(3), range(4)):
        others = [column for column in range(4) if column != dropped]
        target = x @ weight[row]
        solution = torch.linalg.lstsq(x[:, others], target).solution
        residual = (x[:, others] @ solution - target).square().sum()
        assert abs(float(importance[row, dropped] - residual)) < 1e-12 * max(1.0, float(residual))


def test_general_importance_by_hand() -> None:
    # XᵀX = [[2, 1], [1, 2]], its inverse [[2, -1], [-1, 2]] / 3: the diagonal is 2/3
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    inverse = inverse_diagonal(gram, damping=0.0)
    assert torch.allclose(inverse, torch.tensor([2 / 3, 2 / 3]))
    assert torch.allclose(
        general_importance(torch.tensor([[1.0, -2.0]]), inverse), torch.tensor([[1.5, 6.0]]), rtol=1e-6
    )
    # λ is half of the mean of the diagonal: [[3, 1], [1, 3]], whose inverse has 3/8 on its diagonal
    assert torch.allclose(inverse_diagonal(gram, damping=0.5), torch.tensor([3 / 8, 3 / 8]))


def test_a_column_that_is_never_used_costs_what_its_weight_says() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(inverse_diagonal(gram, damping=0.0), torch.tensor([0.25, 1.0]))
    with pytest.raises(ValueError, match="positive definite"):
        inverse_diagonal(torch.ones(2, 2), damping=0.0)


def test_inputs_are_summed_over_batches_and_padding_is_none() -> None:
    model = llama()
    model.eval()
    inputs: list[Tensor] = []
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda _layer, arguments: inputs.append(arguments[0].detach()))
    padded = []
    for batch in GENERAL:
        model(**batch)
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 3))
        padded.append({"input_ids": ids, "attention_mask": (torch.arange(10) < 7).long().expand(2, 10)})
    handle.remove()
    x = torch.cat([part.reshape(-1, 64) for part in inputs]).double()
    expected = inverse_diagonal(x.t() @ x, 0.01)
    for batches in (GENERAL, padded):
        pruner = DPruner(model, targets=["q_proj"])
        pruner.collect_general(batches)
        inverse = pruner._inverse["model.layers.0.self_attn.q_proj"].double()
        assert float((inverse - expected).norm() / expected.norm()) < 1e-4


# ---- dual importance


def test_dual_importance_by_hand() -> None:
    weight, gradient = torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 0.5]])
    general = torch.tensor([[10.0, 100.0]])
    # ∂L/∂θ = g (1 + 2 · 0.5 · 0.1² · G) = 3 · 1.1 and 0.5 · 2; times θ: 6.6 and -1; plus half of the square
    score = dual_importance(weight, gradient, general, 0.5, 0.1, 0.5)
    assert torch.allclose(score, torch.tensor([[6.6 + 0.5 * 6.6**2, -1.0 + 0.5]]))
    taylor = dual_importance(weight, gradient, None, 0.0, 0.1, -0.5)
    assert torch.allclose(taylor, torch.tensor([[6.0 - 18.0, -0.5 - 0.125]]))
    assert torch.allclose(dual_importance(weight, gradient, None, 0.0, 0.1, 0.0), torch.tensor([[6.0, -0.5]]))


def autograd_gradients(model: Any, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: base_layer(model.get_submodule(name)).get_parameter("weight").grad.clone() for name in names}


@pytest.mark.parametrize("second_order", [0.5, -0.5, 0.0])
def test_without_regularisation_it_is_the_taylor_expansion_that_autograd_gives(second_order: float) -> None:
    model = llama().eval()
    names = list(linear_layers(model))
    scores = {name: torch.zeros_like(model.get_submodule(name).weight) for name in names}
    for batch in DOMAIN:
        for name, gradient in autograd_gradients(model, batch, names).items():
            change = gradient * model.get_submodule(name).weight.detach()
            scores[name] += change + second_order * change.square()
    pruner = DPruner(model, regularization=0.0, second_order=second_order)
    own = pruner._scores(pruner._layers, DOMAIN)
    assert own.keys() == scores.keys()
    for name in names:
        assert error(own[name], scores[name]) < 1e-4, name
    pruner.collect(DOMAIN)
    for name, mask in pruner.masks.items():
        expected = largest_mask(scores[name].abs(), scores[name].numel() // 2).mask()
        assert (mask.mask() == expected).float().mean() > 0.999


def test_the_absolute_value_is_taken_after_the_sum() -> None:
    # two batches whose first-order terms cancel for the first weight: residuals +2 and -2 on its input alone
    model = Regression(torch.tensor([[1.0, 1.0]]))
    x = torch.tensor([[1.0, 0.0]])
    batches = [{"x": x, "y": torch.tensor([[-1.0]])}, {"x": x, "y": torch.tensor([[3.0]])}]
    batches.append({"x": torch.tensor([[0.0, 1.0]]), "y": torch.tensor([[0.5]])})
    pruner = pruned(model, domain=batches, regularization=0.0, second_order=0.0, targets=["layer"])
    assert bits(pruner)["layer"].tolist() == [[False, True]]
    # the squares do not cancel: 2 · ½ · 2² against 0.5 + ½ · 0.25
    pruner = pruned(model, domain=batches, regularization=0.0, second_order=0.5, targets=["layer"])
    assert bits(pruner)["layer"].tolist() == [[True, False]]


def test_importance_ranks_as_removing_every_weight_does_on_a_quadratic_loss() -> None:
    # One column is used by each batch, so that the Hessian is diagonal; residuals are ±1, so that the squared gradients
    # of the batches are the Hessian itself. c = -½ is then the exact change of the loss, whatever the gradient.
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 5, generator=generator)
    batches: list[dict[str, Tensor]] = []
    for column in range(5):
        for signs in ([1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]):
            x = torch.zeros(1, 5)
            x[0, column] = 0.2 + float(torch.rand((), generator=generator))
            batches.append({"x": x, "y": x @ weight.t() - torch.tensor([signs])})
    model = Regression(weight)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches)

    whole, removed = loss(), torch.zeros(2, 5)
    for row, column in itertools.product(range(2), range(5)):
        with torch.no_grad():
            model.layer.weight[row, column] = 0.0
        removed[row, column] = loss() - whole
        with torch.no_grad():
            model.layer.weight[row, column] = weight[row, column]
    pruner = DPruner(model, regularization=0.0, second_order=-0.5, targets=["layer"])
    scores = pruner._scores(pruner._layers, batches)["layer"]
    assert torch.allclose(-scores, removed, rtol=1e-4, atol=1e-5)
    assert scores.abs().flatten().argsort().tolist() == removed.abs().flatten().argsort().tolist()


def test_regularisation_keeps_what_is_important_in_general() -> None:
    # both weights are alike to the domain; the inputs of the general text use the second one ten times as much
    model = Regression(torch.tensor([[1.0, 1.0]]))
    domain = [{"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "y": torch.zeros(2, 1)}]
    general = [{"x": torch.tensor([[1.0, 0.0], [0.0, 10.0]]), "y": torch.zeros(2, 1)}]
    kept = bits(pruned(model, general, domain, regularization=1.0, lookahead=0.1, targets=["layer"]))
    assert kept["layer"].tolist() == [[False, True]]
    kept = bits(pruned(model, general, domain, regularization=0.0, targets=["layer"]))
    assert kept["layer"].tolist() == [[True, False]]  # of equal ones the first


# ---- the masks


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_every_matrix_keeps_exactly_its_share(sparsity: float) -> None:
    model = llama()
    pruner = pruned(model, sparsity=sparsity)
    assert pruner.masks.keys() == linear_layers(model).keys()
    hundredths = round(100 * (1 - sparsity))
    assert all(mask.kept() == hundredths * mask.shape.numel() // 100 for mask in pruner.masks.values())


@pytest.mark.parametrize("columns", [16, 128, 48])
def test_every_block_of_columns_keeps_exactly_its_share(columns: int) -> None:
    pruner = pruned(llama(), sparsity=0.7, block_columns=columns)
    for name, mask in bits(pruner).items():
        parts = torch.split(mask, columns, dim=1)  # the last one may be narrower
        assert [int(part.sum()) for part in parts] == [3 * part.numel() // 10 for part in parts], name
    whole = pruned(llama(), sparsity=0.7)
    assert any(not torch.equal(mask, bits(whole)[name]) for name, mask in bits(pruner).items())


def test_fewer_layers_at_once_give_the_same_masks() -> None:
    expected = bits(pruned(llama()))
    for count in (1, 5):
        assert all(
            torch.equal(mask, expected[name]) for name, mask in bits(pruned(llama(), layers_at_once=count)).items()
        )


def test_the_same_batches_give_the_same_masks() -> None:
    first, again = bits(pruned(llama())), bits(pruned(llama()))
    assert all(torch.equal(mask, again[name]) for name, mask in first.items())


# ---- gradients


def test_no_parameter_gets_a_gradient_and_the_model_is_as_it_was() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].eval()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    made: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _gradient, name=name: made.append(name))
    pruned(model)
    assert not made and all(parameter.grad is None for parameter in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_error_on_the_way_leaves_the_model_as_it_was() -> None:
    model = llama()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    pruner = DPruner(model, regularization=0.0)
    with pytest.raises(ValueError, match="batches need labels"):
        pruner.collect([{"input_ids": DOMAIN[0]["input_ids"]}])
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked and not pruner.masks


def test_one_gradient_exists_at_a_time() -> None:
    pruner = DPruner(llama(), regularization=0.0)
    alive: list[int] = []
    import peftkern.sparse.d_pruner as module

    class Counting(module._Gradients):
        def _add(self, name: str, grad: Tensor, x: Tensor) -> None:
            super()._add(name, grad, x)
            alive.append(len(self._parts))

    original, module._Gradients = module._Gradients, Counting  # type: ignore[misc]
    try:
        pruner.collect(DOMAIN)
    finally:
        module._Gradients = original  # type: ignore[misc]
    assert len(alive) == 14 * len(DOMAIN) and set(alive) == {0}


class Twice(nn.Module):
    """A layer that is called twice, and one of whose calls leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Any:
        self.layer(x + 1)
        return SimpleNamespace(loss=self.layer(torch.tanh(self.layer(x))).square().sum())


def test_a_layer_that_is_called_twice_gets_the_sum() -> None:
    model = Twice()
    x = torch.randn(3, 6)
    model(x).loss.backward()
    assert model.layer.weight.grad is not None
    expected = (model.layer.weight.grad * model.layer.weight).detach()
    model.zero_grad()
    pruner = DPruner(model, regularization=0.0, second_order=0.0, targets=["layer"])
    own = pruner._scores(pruner._layers, [{"x": x}])["layer"]
    assert error(own, expected) < 1e-5


def test_gradient_checkpointing_changes_no_score() -> None:
    plain, model = llama(), llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = DPruner(plain, regularization=0.0)
    own = DPruner(model, regularization=0.0)
    scores, reference = own._scores(own._layers, DOMAIN), expected._scores(expected._layers, DOMAIN)
    assert all(error(scores[name], reference[name]) < 1e-5 for name in reference)


# ---- quantized, patched, adapted


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_quantized_weights_are_pruned_as_their_dense_twins(base: str) -> None:
    model = llama(base)
    dense = copy.deepcopy(model)
    for module in list(dense.modules()):
        if isinstance(module, QuantizedLinear):
            module.dequantize_()
    packed = {
        name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    pruner, reference = pruned(model), pruned(dense)
    for name, mask in bits(pruner).items():
        assert (mask == bits(reference)[name]).float().mean() > 0.999, name
    pruner.apply()
    assert all(torch.equal(model.get_submodule(name).weight, was) for name, was in packed.items())
    mask_layers(dense, pruner.masks)
    assert error(outputs(model), outputs(dense)) < 5e-5


def test_patched_models_with_adapters_are_pruned_as_plain_ones() -> None:
    def make() -> Any:
        return lora(llama("nf4"), init_lora_weights=True)  # B is zero, so that adapters change nothing

    expected = bits(pruned(llama("nf4")))
    model = make()
    patch(model)
    own = bits(pruned(model))
    assert {name.removeprefix("base_model.model.") for name in own} == expected.keys()
    for name, mask in own.items():
        assert (mask == expected[name.removeprefix("base_model.model.")]).float().mean() > 0.999, name


# ---- apply


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_apply_masks_the_model_or_writes_zeros(base: str) -> None:
    model = llama(base)
    before = outputs(model)
    pruner = pruned(model)
    pruner.apply()
    expected = outputs(model)
    assert error(expected, before) > 0.01
    assert {name: mask.kept() for name, mask in masks(model).items()} == {
        name: mask.shape.numel() // 2 for name, mask in pruner.masks.items()
    }
    other = llama(base)
    zeros = pruned(other)
    zeros.apply(zeros=True)
    assert error(outputs(other), expected) < 5e-5
    with pytest.raises(ValueError, match="no layer"):
        masks(other)
    layer = other.model.layers[0].self_attn.q_proj
    weight = layer.dequantize() if base == "nf4" else layer.weight
    assert not weight[~zeros.masks["model.layers.0.self_attn.q_proj"].mask()].any()


def test_pruning_by_the_domain_keeps_its_loss_better_than_at_random() -> None:
    def loss(model: Any) -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in DOMAIN)

    model, random = llama(), llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for batch in DOMAIN:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    random.load_state_dict(model.state_dict())
    pruner = pruned(model)
    before = loss(model)
    pruner.apply()
    generator = torch.Generator().manual_seed(0)
    mask_layers(
        random,
        {
            name: largest_mask(torch.rand(tuple(mask.shape), generator=generator), mask.kept())
            for name, mask in pruner.masks.items()
        },
    )
    assert math.isfinite(before) and loss(model) - before < 0.5 * (loss(random) - before)


# ---- refusals


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.0}, {"sparsity": 1.0}, {"regularization": -1.0}, {"damping": -0.1}, {"block_columns": 0}],
)
def test_bad_arguments_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DPruner(llama(), **options)


def test_calls_in_the_wrong_order_and_bad_batches_are_refused() -> None:
    model = llama()
    pruner = DPruner(model)
    with pytest.raises(RuntimeError, match="collect_general"):
        pruner.collect(DOMAIN)
    with pytest.raises(RuntimeError, match="collect"):
        pruner.apply()
    for call in (pruner.collect_general, pruner.collect):
        with pytest.raises(TypeError, match="several times"):
            call(iter(DOMAIN))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was not called"):
        pruner.collect_general([])
    pruned(model).apply()
    with pytest.raises(ValueError, match="has a mask"):
        DPruner(model)
    with pytest.raises(TypeError, match="Linear4bit"):
        DPruner(llama("bnb-nf4"))


def test_importance_that_is_not_a_number_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        DPruner(model, regularization=0.0).collect(DOMAIN)
