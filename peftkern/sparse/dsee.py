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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats import BitMask, QuantizedTensor, SparseIndices
from peftkern.formats.bit_mask import kept_count
from peftkern.integrations.fingerprint import base_of, unwrapped
from peftkern.nn.sparse_linear import SparseDelta, deltas_of
from peftkern.ops.dequantize import dequantize
from peftkern.ops.select_top import select_top
from peftkern.patch.weights import NotFused, read_weight
from peftkern.select.hand_over import drop_state
from peftkern.select.method import Method, logger
from peftkern.sparse.decomposition import sparse_entries
from peftkern.sparse.head_pruning import Attention, find_attentions, remove_heads
from peftkern.sparse.layers import base_layer, linear_layers
from peftkern.sparse.masking import check_maskable, mask_layers
from peftkern.sparse.method import SparseMethod
from peftkern.sparse.pruned import Pruned

NAME = "default"
"""Of the deltas."""

SCORES = ("abs", "wabs")


class DSEE(SparseMethod):
    """Train LoRA adapters and a few entries of the weights under them.

        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
        Trainer(model, ..., callbacks=[method := DSEE()]).train()
        model.save_pretrained(folder)               # the adapters
        method.update().save(folder)                # the deltas
        method.pruned.save(folder)                  # masks, heads

    The model brings its adapters; every layer that has one gets a delta, with the scaling of the adapter. The published
    runs adapt queries and values alone, begin with A from a normal distribution of deviation 0.02, use r = 16, and
    prune either 20% of the entries or 3 of 12 heads.

    Pruning entries puts masks over the base weights (`peftkern.sparse.masks`), dense or quantized, which hold their
    numbers. It needs the scores of all layers of a group at once, 4 bytes for each entry. Pruning heads makes the
    layers of an attention smaller, which have to be dense; where several query heads share a key and value head, they
    go together. What is saved fits models that are pruned alike first: ``Pruned.load(folder).apply_to(model)``.

    The optimizer forgets its state at pruning, as a second run would. A Trainer cannot go on from a checkpoint without
    heads, because it loads adapters first; a loop can, which calls `start` before it loads the model's state.

    Args:
        entries: of Ω, in each layer.
        rank: of the low-rank part of W that Ω is found beside.
        sparsity: share of the entries to prune, of all adapted layers together, and of all other linear layers
            together, heads that give logits left out. 0: none.
        heads: how many heads to prune in every attention (groups of them where keys and values are shared). 0: none.
        score: ``"abs"`` or ``"wabs"``, see above.
        tuning: share of the updates that come before pruning; in the published runs 5 of 15 epochs. A loop that does
            not tell `start` their number calls `prune` itself.
        seed: of the decomposition.

    Attributes:
        pruned: ``None`` before `prune`.

    Raises:
        ValueError: an argument is out of range.
    """

    label = "dsee"

    def __init__(
        self,
        entries: int = 16,
        rank: int = 16,
        sparsity: float = 0.2,
        heads: int = 0,
        score: str = "abs",
        tuning: float = 0.33,
        seed: int = 0,
    ) -> None:
        super().__init__(NAME)
        for name, value, least in (("entries", entries, 1), ("rank", rank, 1), ("heads", heads, 0)):
            if value < least:
                raise ValueError(f"DSEE: {name} must be at least {least}, got {value}")
        for name, share in (("sparsity", sparsity), ("tuning", tuning)):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"DSEE: {name} must be at least 0 and below 1, got {share}")
        if score not in SCORES:
            raise ValueError(f"DSEE: score must be one of {list(SCORES)}, got {score!r}")
        self.entries, self.rank, self.seed = entries, rank, seed
        self.sparsity, self.heads, self.score, self.tuning = sparsity, heads, score, tuning
        self.pruned: Pruned | None = None

    def prepare(self, model: nn.Module) -> None:
        """Decompose the weights, layer by layer, and put a delta on every layer that has an adapter.

        What the model trains already, such as its adapters, is trained; nothing else is.

        Raises:
            RuntimeError: this object has prepared another model.
            ValueError: no layer has an adapter; one has several or another kind than plain LoRA; a base weight is
                trained, cannot be read or has fewer than ``entries``; there are deltas of this name already; or heads
                or entries could not be pruned later.
            TypeError: a layer is of a class that cannot be masked, such as those of bitsandbytes.
        """
        super().prepare(model)
        if self.deltas:
            return
        try:
            adapted = adapted_layers(model)
            self._check_prunable(model, adapted)
            prefix = _prefix(model)
            indices = {prefix + name: self._find(name, one) for name, one in adapted.items()}
            self.take(model, indices, [parameter for parameter in model.parameters() if parameter.requires_grad])
        except (ValueError, TypeError):
            self.model = None
            raise
        for name, one in adapted.items():
            self.deltas[prefix + name].scaling = one.scaling
        logger.info("DSEE: %d entries in each of %d layers beside their adapters", self.entries, len(adapted))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the adapters, and the values of the deltas."""
        return Method.parameters(self)

    def state(self) -> dict[str, Any]:
        pruned = None
        if self.pruned is not None:
            bits = {name: mask.bits for name, mask in self.pruned.masks.items()}
            shapes = {name: list(mask.shape) for name, mask in self.pruned.masks.items()}
            heads = {name: list(groups) for name, groups in self.pruned.heads.items()}
            pruned = {"bits": bits, "shapes": shapes, "heads": heads}
        return {**super().state(), "pruned": pruned}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was read: pruned, if it was. Adapters of a model without heads fit only after it."""
        if state["pruned"] is not None:
            bits, shapes, heads = (state["pruned"][name] for name in ("bits", "shapes", "heads"))
            device = next(iter(self.deltas.values())).values.device
            masks = {name: BitMask(one.to(device), torch.Size(shapes[name])) for name, one in bits.items()}
            self.pruned = Pruned(
                masks, {name: tuple(groups) for name, groups in heads.items()}, base_of(self.prepared())
            )
            self.pruned.apply_to(self.prepared())
        super().load_state(state)

    def after_update(self) -> None:
        waits = self.pruned is None and (self.sparsity > 0 or self.heads > 0)
        if waits and self.steps is not None and self.steps_done >= max(1, round(self.tuning * self.steps)):
            self.prune()

    def prune(self) -> Pruned:
        """Prune heads, then entries, once.

        Raises:
            RuntimeError: no model was prepared, or it has been pruned.
            ValueError: scores are not finite.
        """
        model = self.prepared()
        if self.pruned is not None:
            raise RuntimeError("DSEE: the model has been pruned; make a new object to prune it again")
        kept = self._choose_heads(model) if self.heads else {}
        if kept:
            remove_heads(model, kept)
        masks = self._choose_masks(model) if self.sparsity else {}
        if masks:
            mask_layers(unwrapped(model), masks)
        self.pruned = Pruned(masks, kept, base_of(model))
        if self.optimizer is not None:
            drop_state(self.optimizer, self.parameters())
        logger.info("DSEE\n%s", self.pruned)
        return self.pruned

    def _check_prunable(self, model: nn.Module, adapted: Mapping[str, Adapted]) -> None:
        if self.heads:
            for name, attention in find_attentions(model).items():
                if attention.groups <= self.heads:
                    raise ValueError(f"DSEE: {name} has {attention.groups} heads to prune, got heads={self.heads}")
                if attention.q not in adapted and attention.v not in adapted:
                    raise ValueError(f"DSEE: heads are scored by updates of q and v, and {name} has no adapter there")
        if self.sparsity:
            for name, layer in _pruned_layers(model, adapted).items():
                check_maskable(name, base_layer(layer), "DSEE")

    def _choose_masks(self, model: nn.Module) -> dict[str, BitMask]:
        adapted = adapted_layers(model)
        others = {name: layer for name, layer in _pruned_layers(model, adapted).items() if name not in adapted}
        masks = largest_entries({name: self._score(name, one) for name, one in adapted.items()}, self.sparsity)
        if others:
            masks |= largest_entries({name: read_dense(name, layer) for name, layer in others.items()}, self.sparsity)
        return masks

    def _score(self, name: str, one: Adapted) -> Tensor:
        update = one.update()
        return update if self.score == "abs" else read_dense(name, one.base) + update

    def _choose_heads(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        adapted, kept = adapted_layers(model), {}
        for name, attention in find_attentions(model).items():
            scores = self._score_heads(model, attention, adapted)
            if not bool(scores.isfinite().all()):
                raise ValueError(f"DSEE: the scores of the heads of {name} are not finite")
            kept[name] = tuple(sorted(scores.argsort(stable=True)[self.heads :].tolist()))
        return kept

    def _score_heads(self, model: nn.Module, attention: Attention, adapted: Mapping[str, Adapted]) -> Tensor:
        """[groups] float64: sums of |U|, and of |W| for "wabs", over the rows of q and v of each group."""
        total = torch.zeros(attention.groups, dtype=torch.float64)
        for name in (attention.q, attention.v):
            parts = [adapted[name].update()] if name in adapted else []
            if self.score == "wabs":
                parts.append(read_dense(name, base_layer(unwrapped(model).get_submodule(name))))
            for part in parts:
                total += part.abs().view(attention.groups, -1).sum(1, dtype=torch.float64).cpu()
        return total

    def _find(self, name: str, adapted: Adapted) -> SparseIndices:
        weight = read_dense(name, adapted.base)
        if weight.numel() < self.entries:
            raise ValueError(f"DSEE: {name} has {weight.numel()} entries, fewer than entries={self.entries}")
        flat = sparse_entries(weight, self.entries, self.rank, self.seed)
        return SparseIndices.from_flat(flat, weight.shape)


def largest_entries(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, BitMask]:
    """Masks that drop exactly ⌊sparsity · n⌋ of all n entries, those of the smallest magnitude; of equal ones the last.

    Args:
        scores: by name, [out, in].
        sparsity: share of all entries together that is dropped.

    Raises:
        ValueError: a score is NaN.
    """
    total = sum(score.numel() for score in scores.values())
    places = select_top(list(scores.values()), total - kept_count(total, sparsity))
    masks = {}
    for (name, score), flat in zip(scores.items(), places, strict=True):
        mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        mask.view(-1)[flat] = True
        masks[name] = BitMask.from_mask(mask)
    return masks


def _prefix(model: nn.Module) -> str:
    """What stands in front of names of the model beneath a `PeftModel`."""
    whole = unwrapped(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is whole)


def _pruned_layers(model: nn.Module, adapted: Mapping[str, Adapted]) -> dict[str, nn.Module]:
    """The linear layers whose entries are pruned: those with an adapter, and all others but heads."""
    whole = unwrapped(model)
    others = linear_layers(whole)
    return {name: layer for name, layer in linear_layers(whole, ".*").items() if name in adapted or name in others}


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
    """The linear layers of ``model`` that have an adapter, by their name without PEFT's wrapper.

    Raises:
        ValueError: there are none; or one has several adapters or another kind than plain LoRA.
    """
    found = linear_layers(unwrapped(model), ".*")
    layers = {name: layer for name, layer in found.items() if base_layer(layer) is not layer}
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
