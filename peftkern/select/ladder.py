"""Experimental: a classifier on hidden states of several layers of a model that nothing flows back through.

    pₗ = pool(hₗ)                      hidden state after block l, [tokens, features] of each example, to [features]
    aₗ = GELU(Aₗ pₗ + bₗ)              one adapter per layer
    z  = Σₗ aₗ                         fusion "sum"
         Σₗ softmax(w)ₗ aₗ             fusion "softmax", w trained
         F [a₁; ...; aₙ; s]            fusion "concat", F trained
    z  = z + s                         not for "concat"; s = GELU(S pool(side(x)) + c) of a small model beside
    ŷ  = H z + d

The model runs without gradients: it keeps no activation, and training costs it one forward pass and no backward pass.

Source: LEVI, Roh et al. 2024 (arXiv:2402.04644), section 3: an ensemble over intermediate outputs of a large frozen
model and a small one that is trained. It has no public code; adapters and fusion are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peftkern.select.parts import block_of

POOLINGS = ("mean", "last")
FUSIONS = ("sum", "softmax", "concat")


class LadderClassifier(nn.Module):
    """Classifies by what a frozen model's layers say, each through a small adapter.

    It freezes ``backbone``, of which it holds what is beneath the head. transformers' Trainer trains it as it trains a
    model of its own: it takes ``labels`` and returns a loss.

    Args:
        backbone: a model of `transformers`, quantized or not, with one stack of blocks.
        classes: how many, at least 2.
        layers: which blocks to tap, 0 for the first; ``None``: every fourth, or the last where there are fewer.
        width: features of the adapters' outputs.
        pooling: over the tokens that the attention mask keeps: their ``"mean"``, or the ``"last"`` of them.
        fusion: ``"sum"``, ``"softmax"`` or ``"concat"``.
        side: a small model that is trained from its own start; it is called with ``input_ids`` and ``attention_mask``
            and returns [batch, features], [batch, tokens, features], or an output with ``last_hidden_state``.
        side_features: of the small model; ``None``: its configuration's ``hidden_size``.

    Raises:
        ValueError: an argument is none of these, or ``backbone`` has no stack of blocks or several; it is as it was.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        *,
        layers: Sequence[int] | None = None,
        width: int = 64,
        pooling: str = "mean",
        fusion: str = "softmax",
        side: nn.Module | None = None,
        side_features: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("pooling", pooling, POOLINGS)
        _check_choice("fusion", fusion, FUSIONS)
        if classes < 2 or width < 1:
            raise ValueError(f"LadderClassifier: classes must be at least 2 and width 1, got {classes} and {width}")
        body: nn.Module = getattr(backbone, "base_model", backbone)
        blocks = _blocks(body)
        self.layers = _tapped(layers, len(blocks))
        self.pooling, self.fusion = pooling, fusion
        features = _hidden_size("backbone", body)
        views = len(self.layers) + (side is not None and fusion == "concat")
        self.adapters = nn.ModuleList(nn.Linear(features, width) for _ in self.layers)
        self.weights = nn.Parameter(torch.zeros(len(self.layers))) if fusion == "softmax" else None
        self.mix = nn.Linear(views * width, width) if fusion == "concat" else None
        self.side = side
        self.side_adapter = None if side is None else nn.Linear(side_features or _hidden_size("side", side), width)
        self.head = nn.Linear(width, classes)
        self.backbone = body.requires_grad_(False).eval()
        self._taps = [blocks[layer] for layer in self.layers]

    def train(self, mode: bool = True) -> LadderClassifier:
        """Training or evaluation mode; the frozen model stays in evaluation mode, without dropout."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits, and the cross-entropy where there are labels.

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: of this shape, 1 at tokens and 0 at padding on either side; ``None``: no padding.
            labels: [batch] int64; -100 is left out.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = self.hidden_states(inputs, mask)
        views = [self._adapted(adapter, view) for adapter, view in zip(self.adapters, pooled, strict=True)]
        logits: Tensor = self.head(self._fused(views, self._side_view(inputs, mask)))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def hidden_states(self, inputs: Mapping[str, Tensor | None], mask: Tensor) -> list[Tensor]:
        """What each tapped layer says, pooled: [batch, features] in float32; nothing else of the model is kept."""
        found: dict[str, Tensor] = {}

        def tap(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[name] = pool(output[0] if isinstance(output, tuple) else output, mask, self.pooling)

            return hook

        handles = [self.backbone.get_submodule(name).register_forward_hook(tap(name)) for name in self._taps]
        try:
            self.backbone(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [found[name] for name in self._taps]

    def _side_view(self, inputs: Mapping[str, Tensor | None], mask: Tensor) -> Tensor | None:
        if self.side is None:
            return None
        output = self.side(**inputs)
        states: Tensor = getattr(output, "last_hidden_state", output)
        return self._adapted(self.side_adapter, pool(states, mask, self.pooling) if states.dim() == 3 else states)

    def _adapted(self, adapter: Any, pooled: Tensor) -> Tensor:
        return nn.functional.gelu(adapter(pooled.to(adapter.weight.dtype)))

    def _fused(self, views: list[Tensor], beside: Tensor | None) -> Tensor:
        if self.mix is not None:
            mixed: Tensor = self.mix(torch.cat([*views, *([] if beside is None else [beside])], dim=-1))
            return mixed
        stacked = torch.stack(views)
        if self.weights is not None:
            stacked = stacked * self.weights.softmax(0)[:, None, None]
        return stacked.sum(0) if beside is None else stacked.sum(0) + beside


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per example of ``states`` [batch, tokens, features]: [batch, features] in float32.

    Args:
        mask: [batch, tokens], 0 at padding, which takes no part whatever it holds.
        pooling: ``"mean"`` or ``"last"``.
    """
    kept = mask.bool()
    if pooling == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(kept, positions, 0).amax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), last].float()
    sums = torch.where(kept[..., None], states.float(), 0.0).sum(dim=1)
    return sums / kept.sum(dim=1, keepdim=True).clamp(min=1)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"LadderClassifier: {name} must be one of {list(allowed)}, got {value!r}")


def _blocks(model: nn.Module) -> list[str]:
    blocks = list(dict.fromkeys(block for name, _ in model.named_modules() if (block := block_of(name)) is not None))
    stacks = {name.rpartition(".")[0] for name in blocks}
    if len(stacks) != 1:
        raise ValueError(f"LadderClassifier: backbone must have one stack of blocks, found {sorted(stacks) or 'none'}")
    return blocks


def _tapped(layers: Sequence[int] | None, blocks: int) -> list[int]:
    if layers is None:
        return list(range(3, blocks, 4)) or [blocks - 1]
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < blocks for layer in layers):
        raise ValueError(f"LadderClassifier: layers must be some of 0 to {blocks - 1}, each once; got {list(layers)}")
    return sorted(layers)


def _hidden_size(what: str, model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    if size is None:
        raise ValueError(
            f"LadderClassifier: {what} has no configuration with a hidden_size"
            + ("; give side_features" if what == "side" else "")
        )
    return int(size)
