"""Batches without padding: the examples of a batch one behind the other in one row, none of which sees another.

transformers' models keep the examples of such a row apart by their position ids, which begin anew with each of them:
where a batch has position ids, no attention mask and no cache, the mask of its attention is the causal one within each
run of consecutive positions. With a cache, which their configs turn on by default, they do not, and say nothing; so a
batch made here turns it off. Not every model does it at all: `check_packing` finds that out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Between logits of a packed and of a separate example, ‖difference‖ / ‖logits‖. One that sees another is at 1e-2 in
the mildest case known (BLOOM in float32), and mostly above 0.2."""

_LENGTHS = (4, 1, 7)


class PackingCollator:
    """Joins the examples of a batch in one row of tokens, for causal language models.

    A drop-in for a collator that pads: the same loss and gradients, no token of padding computed. The tokens of a batch
    share one attention mask, [tokens, tokens]; `attend_by_example` keeps a CPU from computing what it leaves out.

    >>> peftkern.check_packing(model)
    >>> Trainer(model, arguments, train_dataset=examples, data_collator=peftkern.PackingCollator())
    """

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: each with ``input_ids``, [tokens] as a list or tensor; ``labels`` of the same length, -100 where
                the loss ignores them, by default the ids; and ``attention_mask``, whose zeros are left out.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, int64 [1, tokens of all examples], and ``use_cache``,
            ``False``. The first label of each example is -100, since nothing in front of it predicts it.

        Raises:
            ValueError: there is no token, or labels or mask have another length than the ids.
        """
        batch: dict[str, Any] = self._flatten([_without_padding(example) for example in examples])
        return {**batch, "use_cache": False}


def _without_padding(example: Mapping[str, Any]) -> dict[str, list[int]]:
    ids = _as_list(example["input_ids"])
    labels = _as_list(example.get("labels", ids))
    mask = _as_list(example.get("attention_mask", [1] * len(ids)))
    if not len(ids) == len(labels) == len(mask):
        raise ValueError(
            f"PackingCollator: an example has {len(ids)} input_ids, {len(labels)} labels and "
            f"{len(mask)} numbers in attention_mask; there must be one of each for every token"
        )
    kept = [position for position, keep in enumerate(mask) if keep]
    return {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}


def _as_list(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def check_packing(model: nn.Module) -> None:
    """Raise unless ``model`` computes the same logits for examples in one row as for each alone.

    Runs a dozen tokens twice, in evaluation mode; the model is as before.

    Args:
        model: a causal language model of transformers, with adapters or without, patched or not.

    Raises:
        ValueError: an example sees another one, or its position; or the model takes no ``position_ids``.
    """
    name = type(_inner(model)).__name__
    device = next(model.parameters()).device
    vocabulary = _inner(model).config.get_text_config().vocab_size
    ids = [[(7 * i + 3 * n + 1) % vocabulary for i in range(n)] for n in _LENGTHS]
    batch = PackingCollator()([{"input_ids": example} for example in ids])
    # with gradients: without them bitsandbytes repacks its weights on the CPU for good when it evaluates
    with _evaluating(model), torch.enable_grad():
        try:
            packed = model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}).logits
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be trained on packed rows: {error}") from error
        alone = [model(input_ids=torch.tensor([example], device=device)).logits[0] for example in ids]
    expected = torch.cat(alone).detach().float()
    difference = ((packed[0].detach().float() - expected).norm() / expected.norm()).item()
    if not difference <= _TOLERANCE.get(packed.dtype, 1e-4):
        raise ValueError(
            f"{name} cannot be trained on packed rows: its logits differ by {difference:.1e} from those of each "
            "example alone, so examples see each other; pad instead"
        )


def attend_by_example(model: nn.Module) -> bool:
    """Let the attention of ``model`` take the examples of packed rows one by one, the numbers being the same.

    PyTorch's attention goes through the whole mask of a row, [tokens, tokens], of which packing leaves a few blocks.
    Where the examples begin is read from the position ids, which a GPU would have to wait for: this is for the CPU.
    ``set_attn_implementation("sdpa")`` undoes it.

    Args:
        model: a model of transformers, with adapters or without, patched or not.

    Returns:
        Whether it does now; ``False`` and nothing changed where the model is not on the CPU or does not run PyTorch's
        attention ("sdpa").
    """
    inner = _inner(model)
    if inner.device.type != "cpu" or inner.config._attn_implementation not in ("sdpa", _ATTENTION):
        return False
    AttentionInterface.register(_ATTENTION, _attention_by_example)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    inner.set_attn_implementation(_ATTENTION)
    return True


_ATTENTION = "peftkern_by_example"


def _attention_by_example(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' attention: query, key and value are [rows, heads, tokens, features of a head]."""
    bounds = _bounds(options.get("position_ids"), query, key)
    if attention_mask is None or len(bounds) < 3:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    parts = [
        sdpa_attention_forward(
            module, *(t[:, :, a:b] for t in (query, key, value)), attention_mask[..., a:b, a:b], **options
        )[0]
        for a, b in pairwise(bounds)
    ]
    return torch.cat(parts, dim=1), None


def _bounds(position_ids: Tensor | None, query: Tensor, key: Tensor) -> list[int]:
    """Where the examples of a single row begin, and its end; empty where that is not known."""
    tokens = query.shape[2]
    if position_ids is None or query.shape[0] != 1 or key.shape[2] != tokens or position_ids.shape != (1, tokens):
        return []
    breaks = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    return [0, *breaks.tolist(), tokens]


def _inner(model: Any) -> Any:
    """The transformers model behind adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
