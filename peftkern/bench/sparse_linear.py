"""A sparse delta's own work on one linear 4096x4096, 512 tokens, float32: its product, its part of dX, and dS.

The base products, ``x Wᵀ`` and ``dY W``, are the same on all sides and are left out; ours adds to their results. Peers:

* the dense form, which is what published code does: W is copied and the delta scattered into the copy, which takes the
  place of W in both products; the dense ``dW = dYᵀ x`` is formed, and its entries gathered. The copy is made once for
  both products. Code that does not keep it for the backward pass makes it twice.
* ``torch.sparse``: products with a CSR matrix, both orders of which are there, and ``sampled_addmm``.

Memory is what one forward and backward needs beside its inputs, y and dX.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.bench import fresh_process, memory, peers
from peftkern.bench.case import Case, Effort, Measurement
from peftkern.bench.errors import DisagreementError
from peftkern.bench.registry import ALLOCATOR_TUNED
from peftkern.bench.result import Quantity
from peftkern.formats import SparseIndices

SIZE, TOKENS = 4096, 512
SCALING = 0.5
EFFORT = Effort(seconds=5.0)


@dataclass(frozen=True)
class Layer:
    """A frozen weight with a delta on it, and one batch."""

    weight: Tensor
    indices: SparseIndices
    values: Tensor
    x: Tensor
    grad: Tensor

    def base(self) -> tuple[Tensor, Tensor]:
        """``x Wᵀ`` and ``dY W``."""
        return self.x @ self.weight.t(), self.grad @ self.weight


def setup_layer(density: float, size: int = SIZE, tokens: int = TOKENS) -> Layer:
    """Random weight, entries, values and batch; the entries are ``density`` of the weight, anywhere in it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    entries = round(density * size * size)
    flat = torch.randperm(size * size, generator=generator)[:entries].sort().values
    indices = SparseIndices.from_flat(flat, (size, size))
    return Layer(0.02 * randn(size, size), indices, 0.02 * randn(entries), randn(tokens, size), randn(tokens, size))


# ---- the three sides


def run_ours(layer: Layer, y: Tensor, grad_x: Tensor) -> Tensor:
    """Adds the delta's part to y and dX; returns dS."""
    delta = (layer.values, layer.indices, SCALING)
    registry.run("sparse_delta", y, layer.x, *delta)
    gradient: Tensor = registry.run("sparse_delta_backward", layer.grad, layer.x, grad_x, *delta, True)
    return gradient


@dataclass(frozen=True)
class DenseForm:
    """What published code does with the delta, beside the two products."""

    layer: Layer
    flat: Tensor

    def weight(self) -> Tensor:
        """W with the delta in it, a copy."""
        weight = self.layer.weight.clone()
        weight.view(-1).index_add_(0, self.flat, self.layer.values, alpha=SCALING)
        return weight

    def gradient(self) -> Tensor:
        """dS, out of the dense dW."""
        return SCALING * (self.layer.grad.t() @ self.layer.x).view(-1)[self.flat]

    def run(self) -> tuple[Tensor, Tensor]:
        """All of it, the products left out."""
        return self.weight(), self.gradient()


@dataclass(frozen=True)
class TorchSparse:
    """The same work by the operators of ``torch.sparse``."""

    layer: Layer
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, layer: Layer) -> TorchSparse:
        """With the matrix in both orders."""
        indices, values = layer.indices, layer.values
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "in beta state"
            rows = torch.sparse_csr_tensor(indices.row_offsets, indices.columns.long(), values, indices.shape)
            turned = (indices.column_offsets, indices.rows.long(), values[indices.order])
            return cls(layer, rows, torch.sparse_csr_tensor(*turned, (indices.shape[1], indices.shape[0])))

    def run(self, y: Tensor, grad_x: Tensor) -> Tensor:
        """Adds the delta's part to y and dX; returns dS."""
        x, grad = self.layer.x, self.layer.grad
        y.add_((self.rows @ x.t()).t(), alpha=SCALING)
        grad_x.add_((self.columns @ grad.t()).t(), alpha=SCALING)
        sampled: Tensor = torch.sparse.sampled_addmm(self.rows, grad.t(), x, beta=0.0, alpha=SCALING).values()
        return sampled


# ---- cases


def setup_case(layer: Layer, peer: str) -> Case:
    """Ours beside ``peer``: "dense form" or "torch.sparse"."""
    y, grad_x = torch.zeros_like(layer.grad), torch.zeros_like(layer.x)
    theirs: Callable[[], object]
    if peer == "dense form":
        dense = DenseForm(layer, layer.indices.flat())
        theirs, check = dense.run, lambda: _check_dense(layer, dense)
    else:
        sparse = TorchSparse.of(layer)
        theirs, check = lambda: sparse.run(y, grad_x), lambda: _check(layer, sparse.run)
    return Case(_text(layer, peer), lambda: run_ours(layer, y, grad_x), theirs, check, effort=EFFORT)


def _text(layer: Layer, peer: str) -> str:
    return f"delta alone, {len(layer.indices):,} entries, {layer.x.shape[0]} tokens | {peer}"


def _results(layer: Layer, run: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    y, grad_x = layer.base()
    gradient = run(y, grad_x)
    return {"y": y, "dX": grad_x, "dS": gradient}


def _check(layer: Layer, peer: Callable[[Tensor, Tensor], Tensor]) -> None:
    ours, theirs = _results(layer, lambda y, grad_x: run_ours(layer, y, grad_x)), _results(layer, peer)
    peers.check_agreement({name: (ours[name], theirs[name]) for name in theirs}, peers.FLOAT32_TOLERANCE)


def _check_dense(layer: Layer, dense: DenseForm) -> None:
    def run(y: Tensor, grad_x: Tensor) -> Tensor:
        weight = dense.weight()
        y.copy_(layer.x @ weight.t())
        grad_x.copy_(layer.grad @ weight)
        return dense.gradient()

    _check(layer, run)


def measure_memory(density: float, size: int = SIZE, tokens: int = TOKENS) -> Measurement:
    """Peak of resident memory beside what was there before, ours and the dense form's, each in a fresh process.

    Freed memory is returned there: what setting up has freed would otherwise be taken again, and not be seen.

    Raises:
        DisagreementError: ours is as large as a buffer [out, in], of which there should be none.
        BenchError: this system does not tell or reset the peak.
    """
    extra = {}
    for side in ("ours", "peer"):
        arguments = {"side": side, "density": density, "size": size, "tokens": tokens}
        function = "peftkern.bench.sparse_linear:extra_memory"
        extra[side] = float(fresh_process.call(function, arguments, memory.FREED_MEMORY_RETURNED))
    buffer = 4 * size * size / 1e6
    if extra["ours"] >= buffer:
        raise DisagreementError(f"ours takes {extra['ours']:.1f} MB, as much as a buffer [out, in], {buffer:.1f} MB")
    text = (
        f"peak of extra memory ([out, in] has {buffer:.1f} MB), {round(density * size * size):,} entries | dense form"
    )
    return Measurement(text, "MB", Quantity.MEMORY, [extra["ours"]], [extra["peer"]])


def extra_memory(side: str, density: float, size: int, tokens: int) -> float:
    """Of one side, in MB. Runs in a fresh process."""
    small = setup_layer(0.1, size=64, tokens=8)
    _side(side, small)()  # loads the code
    function = _side(side, setup_layer(density, size, tokens))
    return _extra_megabytes(function)


def _side(side: str, layer: Layer) -> Callable[[], object]:
    if side == "peer":
        return DenseForm(layer, layer.indices.flat()).run
    y, grad_x = torch.zeros_like(layer.grad), torch.zeros_like(layer.x)
    return lambda: run_ours(layer, y, grad_x)


def _extra_megabytes(function: Callable[[], object]) -> float:
    memory.reset_peak()
    before = memory.resident_megabytes("VmRSS")
    result = function()
    extra = memory.resident_megabytes("VmHWM") - before
    del result
    return max(extra, 0.0)


def _cases(density: float) -> Iterator[Case | Measurement]:
    if not os.environ.keys() & ALLOCATOR_TUNED.environment.keys():  # once: it has processes of its own
        yield measure_memory(density)
    layer = setup_layer(density)
    yield setup_case(layer, "dense form")
    yield setup_case(layer, "torch.sparse")


def one_in_ten_thousand() -> Iterator[Case | Measurement]:
    """``sparse-linear-0.01``."""
    yield from _cases(0.0001)


def one_in_thousand() -> Iterator[Case | Measurement]:
    """``sparse-linear-0.1``."""
    yield from _cases(0.001)


def one_in_hundred() -> Iterator[Case | Measurement]:
    """``sparse-linear-1``."""
    yield from _cases(0.01)


def five_in_hundred() -> Iterator[Case | Measurement]:
    """``sparse-linear-5``."""
    yield from _cases(0.05)
