"""Part of a batch: some of its rows, or some tokens of one row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftkern.select.method import logger

_IGNORED = -100
"""The label of a token that the loss passes over."""


def sample_batch(batch: Mapping[str, Any], share: float, seed: int, cut_tokens: bool = True) -> dict[str, Any]:
    """About ``share`` of ``batch``: rows drawn by ``seed``, or where that is less than one, consecutive tokens of one.

    Rows without a label are passed over where others have some, and tokens are drawn where there are labels.
    What cannot be cut is kept whole, and logged: rows where tensors have different numbers of them; tokens where labels
    are not one for each token.

    Args:
        batch: by name, tensors [rows, ...]. What is no tensor, or one without dimensions, is passed on.
        share: above 0, at most 1.
        cut_tokens: whether tokens may be taken out of a row.

    Raises:
        ValueError: ``share`` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"sample must be above 0 and at most 1, got {share}")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    if share == 1 or not tensors:
        return dict(batch)
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        logger.info("the probe sees the whole batch: its tensors have different numbers of rows, %s", shapes)
        return dict(batch)
    generator = torch.Generator().manual_seed(seed)
    wanted = share * next(iter(tensors.values())).shape[0]
    rows = _rows(tensors, max(1, math.floor(wanted + 0.5)), generator)
    tensors = {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}
    if wanted < 1:
        tensors = _tokens(tensors, wanted, generator, cut_tokens)
    return {**batch, **tensors}


def _rows(tensors: Mapping[str, Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Ascending numbers of ``count`` rows, or of fewer where fewer have labels."""
    usable = torch.arange(next(iter(tensors.values())).shape[0])
    labels = tensors.get("labels")
    if labels is not None and labels.dim() == 2:
        labelled = (labels[:, 1:] != _IGNORED).any(1).cpu()  # the first token is not predicted
        usable = usable[labelled] if bool(labelled.any()) else usable
    return usable[torch.randperm(len(usable), generator=generator)[:count]].sort().values


def _tokens(
    tensors: dict[str, Tensor], share: float, generator: torch.Generator, cut_tokens: bool
) -> dict[str, Tensor]:
    """``share`` of the tokens of one row."""
    labels = tensors.get("labels")
    if not cut_tokens or labels is None or labels.dim() != 2 or not _by_token(tensors, labels.shape[1]):
        logger.info("the probe sees one whole row: there is not one label for each of its tokens")
        return tensors
    length = min(max(2, math.ceil(share * labels.shape[1])), labels.shape[1])
    # of every window the labels that count: its first token is not predicted
    counted = (labels[0, 1:] != _IGNORED).cpu().long()
    counts = counted.unfold(0, length - 1, 1).sum(1)
    starts = (counts * 2 >= counts.max()).nonzero().flatten()
    begin = int(starts[torch.randint(len(starts), (), generator=generator)])
    return {name: t if t.dim() == 1 else t[:, begin : begin + length] for name, t in tensors.items()}


def _by_token(tensors: Mapping[str, Tensor], tokens: int) -> bool:
    return tokens > 1 and all(
        tensor.dim() == 1 or (tensor.shape[1] == tokens and tokens not in tensor.shape[2:])
        for tensor in tensors.values()
    )
