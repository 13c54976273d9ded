"""DSEE: a low-rank and a sparse update together, and a base that is pruned where they matter least.

    y = x (W ⊙ M + s B A + s S)ᵀ        S at fixed entries Ω, M from the middle of training on

1. Ω is found by decomposing the pretrained W (`peftkern.sparse.decomposition`); A, B and S are trained, S from zero.
2. The base is pruned once: entries by magnitude over all layers together, or whole heads.
3. A, B and S are trained on.

What the scores of an entry or head are made of, with the whole update U = s (B A + S) in both cases:

    "abs"     |U| in adapted layers             "wabs"    |W + U|; of a head |U| + |W|

and |W| in layers without an adapter, which are a group of their own. The mask is on W alone: what is updated at a
pruned entry stays. The published code scales only S in its second kind of score, by a missing bracket.

Source: DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models, Chen et al. 2021
(arXiv:2111.00160), sections 3.2 and 3.3, and the code that was published with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats import QuantizedTensor, SparseIndices
from peftkern.nn.sparse_linear import SparseDelta, deltas_of
from peftkern.ops.dequantize import dequantize
from peftkern.patch.weights import NotFused, read_weight
from peftkern.select.method import Method, logger
from peftkern.sparse.decomposition import sparse_entries
from peftkern.sparse.layers import attach, base_layer, linear_layers

NAME = "dsee"
"""Of the deltas."""


class DSEE(Method):
    """Train LoRA adapters and a few entries of the weights under them.

        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
        method = DSEE()
        method.prepare(model)
        ...
        peftkern.sparse.SparseUpdate.from_model(model, "dsee").save(folder)     # beside PEFT's adapter

    The model brings its adapters; every layer that has one gets a delta, with the scaling of the adapter. The published
    runs adapt queries and values alone, begin with A from a normal distribution of deviation 0.02, and use r = 16.

    Args:
        entries: of Ω, in each layer.
        rank: of the low-rank part of W that Ω is found beside.
        seed: of the decomposition.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, entries: int = 16, rank: int = 16, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("entries", entries), ("rank", rank)):
            if value < 1:
                raise ValueError(f"DSEE: {name} must be at least 1, got {value}")
        self.entries, self.rank, self.seed = entries, rank, seed
        self._prepared = False

    def prepare(self, model: nn.Module) -> None:
        """Decompose the weights, layer by layer, and put a delta on every layer that has an adapter.

        Raises:
            RuntimeError: this object has prepared another model.
            ValueError: no layer has an adapter; one has several or another kind than plain LoRA; a base weight is
                trained, cannot be read or has fewer than ``entries``; or there are deltas of this name already.
        """
        super().prepare(model)
        if self._prepared:
            return
        try:
            adapted = adapted_layers(model)
            attached = attach(model, {name: self._find(name, one) for name, one in adapted.items()}, NAME)
        except (ValueError, TypeError):
            self.model = None
            raise
        for name, delta in attached.items():
            delta.scaling = adapted[name].scaling
        self._prepared = True
        logger.info("DSEE: %d entries in each of %d layers beside their adapters", self.entries, len(attached))

    def _find(self, name: str, adapted: Adapted) -> SparseIndices:
        weight = read_dense(name, adapted.base)
        if weight.numel() < self.entries:
            raise ValueError(f"DSEE: {name} has {weight.numel()} entries, fewer than entries={self.entries}")
        flat = sparse_entries(weight, self.entries, self.rank, self.seed)
        return SparseIndices.from_flat(flat, weight.shape)


# ---- adapted layers


@dataclass(frozen=True)
class Adapted:
    """A layer with one LoRA adapter.

    Attributes:
        base: the linear layer beneath it.
        A, B: weights of the adapter, [r, in] and [out, r].
        scaling: s.
    """

    base: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    @property
    def delta(self) -> SparseDelta | None:
        """S; ``None`` before `DSEE.prepare`."""
        return deltas_of(self.base).get(NAME)

    def update(self) -> Tensor:
        """U = s (B A + S), [out, in] float32."""
        update = self.B.detach().float() @ self.A.detach().float()
        if self.delta is not None:
            update.view(-1)[self.delta.indices.flat()] += self.delta.values.detach().float()
        return self.scaling * update


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The linear layers of ``model`` that have an adapter, by name.

    Raises:
        ValueError: there are none; or one has several adapters or another kind than plain LoRA.
    """
    layers = {name: layer for name, layer in linear_layers(model, ".*").items() if base_layer(layer) is not layer}
    if not layers:
        raise ValueError(
            "DSEE: trains sparse entries beside LoRA adapters, and the model has none; call peft.get_peft_model first"
        )
    return {name: _read(name, layer) for name, layer in layers.items()}


def _read(name: str, layer: Any) -> Adapted:
    present = getattr(layer, "lora_A", {})
    names = [adapter for adapter in layer.active_adapters if adapter in present]
    if len(names) != 1 or len(present) != 1 or layer.lora_variant or layer.merged_adapters:
        raise ValueError(f"DSEE: {name} must have one adapter of plain LoRA, not merged; it has {list(present)}")
    adapter = names[0]
    return Adapted(
        base_layer(layer), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, float(layer.scaling[adapter])
    )


def read_dense(name: str, base: nn.Module) -> Tensor:
    """The weight of a linear layer, dense or quantized: [out, in] float32.

    Raises:
        ValueError: it is trained, or cannot be read.
    """
    try:
        weight = read_weight(base)
    except NotFused as error:
        raise ValueError(f"DSEE: {name}: {error}") from error
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight, torch.float32)
    return weight.detach().float()
