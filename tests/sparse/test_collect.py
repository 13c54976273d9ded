"""Gradients of weights in pieces: the same numbers as the dense gradient, without it."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
import torch.utils.checkpoint
from sparse_models import batches, error, llama, lora
from torch import Tensor, nn

import peftkern
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.sparse import collect, linear_layers
from peftkern.sparse.collect import LayerGradients, TopEntries, gradient_at, gradient_tiles, top_of_gradient
from peftkern.sparse.layers import base_layer


def pair(tokens: int = 9, out: int = 13, in_: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_, generator=generator).to(dtype)
    return x, torch.randn(tokens, out, generator=generator).to(dtype)


@pytest.mark.parametrize("tile", [1, 10, 28, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_are_the_dense_gradient(tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "TILE_ELEMENTS", tile)
    x, grad = pair(dtype=dtype)
    tiles = list(gradient_tiles(x, grad))
    rows = max(1, tile // 7)
    assert [first for first, _ in tiles] == list(range(0, 13, rows))
    assert error(torch.cat([part for _, part in tiles]), grad.double().t() @ x.double()) <= 1e-6


def test_the_entries_at_an_index_set_are_those_of_the_dense_gradient() -> None:
    x, grad = pair()
    flat = torch.tensor([0, 6, 7, 40, 90])
    got = gradient_at(x, grad, SparseIndices.from_flat(flat, (13, 7)))
    assert error(got, (grad.double().t() @ x.double()).reshape(-1)[flat]) <= 1e-6


@pytest.mark.parametrize("k", [0, 1, 5, 40, 91, 100])
@pytest.mark.parametrize("tile", [1, 14, 1000])
def test_the_top_of_a_gradient_in_tiles_is_that_of_the_whole(
    k: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "TILE_ELEMENTS", tile)
    x, grad = pair()
    dense = torch.cat([part for _, part in gradient_tiles(x, grad)]).reshape(-1)
    expected = dense.abs().topk(min(k, 91)).indices.sort().values
    assert torch.equal(top_of_gradient(x, grad, k), expected)


@pytest.mark.parametrize("piece", [1, 2, 3, 8])
def test_ties_go_to_the_lower_index_wherever_pieces_begin(piece: int) -> None:
    entries = torch.tensor([1.0, -2.0, 1.0, 2.0, 0.5, -1.0, 2.0, 1.0])
    for k, expected in ((2, [1, 3]), (3, [1, 3, 6]), (4, [0, 1, 3, 6]), (5, [0, 1, 2, 3, 6]), (8, list(range(8)))):
        top = TopEntries(k)
        for begin in range(0, 8, piece):
            top.add(begin, entries[begin : begin + piece])
        flat, values = top.result()
        assert flat.tolist() == expected
        assert torch.equal(values, entries[flat])


def test_a_gradient_that_is_nan_has_no_top() -> None:
    top = TopEntries(2)
    with pytest.raises(ValueError, match="NaN"):
        top.add(0, torch.tensor([1.0, 3.0, 2.0, 1.0, float("nan")]))
    top = TopEntries(2)
    top.add(0, torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="NaN"):
        top.result()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_hooks_see_what_makes_the_gradient_of_every_layer(base: str, patched: bool, checkpointing: bool) -> None:
    """Against the dense gradients of a copy whose weights are the dequantized ones, beneath the same adapters."""
    model = lora(llama(base))
    plain = lora(llama(base))
    names = list(linear_layers(model))
    weights: dict[str, nn.Parameter] = {}
    for name, layer in linear_layers(plain).items():
        below = base_layer(layer)
        weight = below.weight if base == "dense" else below.dequantize_(torch.float32).weight  # type: ignore[operator]
        weights[name] = nn.Parameter(weight.detach().clone())  # type: ignore[operator]
        below.weight = weights[name]
    plain(**batches(1)[0]).loss.backward()
    if patched:
        peftkern.patch(model, strict=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    got: dict[str, Tensor] = {}

    def receive(name: str, x: Tensor, grad: Tensor) -> None:
        assert name not in got
        got[name] = grad.t() @ x

    with LayerGradients(linear_layers(model), receive):
        model(**batches(1)[0]).loss.backward()
    assert sorted(got) == sorted(names)
    for name, dense in got.items():
        assert error(dense, weights[name].grad) <= 1e-5, name  # type: ignore[arg-type]
    got.clear()
    model(**batches(1)[0]).loss.backward()
    assert not got
    assert not any(layer._forward_hooks for layer in linear_layers(model).values())


def test_layers_are_watched_where_nothing_is_trained_and_outputs_may_be_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).requires_grad_(False)
    x, got = torch.randn(5, 3), dict[str, Tensor]()
    dense = [nn.Parameter(layer.weight.detach().clone()) for layer in (model[0], model[2])]
    hidden = nn.functional.linear(x, dense[0], model[0].bias).relu()
    nn.functional.linear(hidden, dense[1], model[2].bias).square().sum().backward()

    def receive(name: str, x: Tensor, grad: Tensor) -> None:
        got[name] = grad.t() @ x

    with LayerGradients({"0": model[0], "2": model[2]}, receive):
        with torch.no_grad():
            model(x)
        model(x).square().sum().backward()
    for name, weight in zip(("0", "2"), dense, strict=True):
        assert error(got[name], weight.grad) <= 1e-6  # type: ignore[arg-type]


def test_checkpointed_layers_do_not_keep_their_inputs() -> None:
    seen: list[weakref.ref[Tensor]] = []
    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(lambda _layer, args: seen.append(weakref.ref(args[0])))

    def block(x: Tensor) -> Tensor:
        return layer(x * 2)  # type: ignore[no-any-return]

    x, got = torch.randn(3, 4, requires_grad=True), list[Tensor]()
    with LayerGradients({"": layer}, lambda _name, x, grad: got.append(grad.t() @ x)):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        assert seen[0]() is None
        y.sum().backward()
    assert len(got) == 1
    assert error(got[0], layer.weight.grad) <= 1e-6  # type: ignore[arg-type]


MEMORY = """
import resource, torch
from peftkern.sparse.collect import top_of_gradient
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, grad = torch.randn(8, 6000, generator=generator), torch.randn(8, 6000, generator=generator)
top_of_gradient(x[:, :60], grad[:, :60], 5)  # what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(top_of_gradient(x, grad, 3600)) == 3600
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_selecting_never_holds_a_tenth_of_the_dense_gradient() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    dense = 6000 * 6000 * 4
    assert int(done.stdout) < dense / 10
