"""Token ids and labels of examples, the held-out split, and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.errors import InputError
from peftkern.finetune.examples import MarkedText, choose_marker
from peftkern.finetune.rows import is_running_text, read_rows

IGNORED = -100
"""The label of tokens that the loss leaves out, as transformers and torch define it."""

Example = dict[str, list[int]]
"""``input_ids`` and ``labels``, equally long; a label is the token's own id or :data:`IGNORED`."""


@dataclass(frozen=True)
class Encoded:
    """Examples, and what had to be done to them: how many were cut, and how many had nothing left to learn."""

    examples: list[Example] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Splits:
    """What is learned and what is held out. ``cut`` and ``dropped`` count examples of both."""

    train: list[Example]
    held_out: list[Example]
    cut: int
    dropped: int


def load_splits(config: FinetuneConfig, tokenizer: Any, max_length: int) -> Splits:
    """Read, encode and split the data that the settings name. Examples are cut to ``max_length`` tokens.

    Raises:
        InputError: the data are missing, malformed, empty, or leave nothing to learn.
    """
    encoded = _load(config, config.data, "--data", tokenizer, max_length)
    if config.eval_data is None:
        train, held_out = split(encoded.examples, config.held_out_share, config.max_eval_examples)
        return Splits(train, held_out, encoded.cut, encoded.dropped)
    other = _load(config, config.eval_data, "--eval-data", tokenizer, max_length)
    held_out = _first_by_digest(other.examples, config.max_eval_examples)
    return Splits(encoded.examples, held_out, encoded.cut + other.cut, encoded.dropped + other.dropped)


def _load(config: FinetuneConfig, data: str, option: str, tokenizer: Any, max_length: int) -> Encoded:
    rows = read_rows(data, option, config.dataset_subset, config.dataset_split)
    mark = choose_marker(config, rows, tokenizer, option)
    marked = [mark(row) for row in rows]
    if is_running_text(data):
        return _encode_running_text(marked, tokenizer, max_length, option)
    return encode(marked, tokenizer, max_length, option)


def encode(marked: Sequence[MarkedText], tokenizer: Any, max_length: int, option: str = "--data") -> Encoded:
    """Tokenize, mask what the loss leaves out, and cut to ``max_length`` tokens.

    Raises:
        InputError: after cutting, no example has a token to learn.
    """
    whole = [_encode_one(text, tokenizer) for text in marked]
    cut = [{name: values[:max_length] for name, values in example.items()} for example in whole]
    examples = [example for example in cut if _learns(example)]
    if not examples:
        raise InputError(
            f"{option}: no example has a token to learn within --max-length {max_length}: all labels are masked. "
            "Check that responses are not empty, raise --max-length, or use --no-response-only"
        )
    too_long = sum(len(example["input_ids"]) > max_length for example in whole)
    return Encoded(examples, too_long, len(whole) - len(examples))


def _learns(example: Example) -> bool:
    """The first label is never predicted, so it does not count."""
    return any(label != IGNORED for label in example["labels"][1:])


def _encode_one(marked: MarkedText, tokenizer: Any) -> Example:
    if not tokenizer.is_fast:
        raise InputError(
            "MODEL: its tokenizer does not say where in the text a token stands; it needs a fast tokenizer"
        )
    encoding = tokenizer(marked.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoding["input_ids"])
    learned = [any(begin <= start < end for begin, end in marked.spans) for start, _ in encoding["offset_mapping"]]
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    start = [] if marked.complete else _start_tokens(tokenizer)
    return {"input_ids": start + ids, "labels": [IGNORED] * len(start) + labels}


def _start_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts in front of a text, if it does."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def _encode_running_text(marked: Sequence[MarkedText], tokenizer: Any, max_length: int, option: str) -> Encoded:
    """One long text becomes blocks of ``max_length`` tokens; nothing is cut away."""
    ids = [token for text in marked for token in _encode_one(text, tokenizer)["input_ids"]]
    blocks = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    examples = [{"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1]
    if not examples:
        raise InputError(f"{option}: the text has {len(ids)} token; it needs at least 2")
    return Encoded(examples)


# ---- split


def split(examples: Sequence[Example], share: float, limit: int) -> tuple[list[Example], list[Example]]:
    """Hold out about ``share`` of the examples: at least one if ``share`` is positive, about ``limit`` at most.

    Which ones depends on their content alone, not on a seed or on their order. Equal examples fall on the same side,
    so that nothing held out is also learned.

    Returns:
        What is learned, and what is held out, both in the order that they came in.

    Raises:
        InputError: ``share`` is positive and there are not two different examples.
    """
    if share == 0:
        return list(examples), []
    digests = [_digest(example) for example in examples]
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise InputError(
            "--eval-fraction: holding examples out takes two different ones, the data have one; "
            "add data, give --eval-data, or set --eval-fraction 0"
        )
    chosen = set(distinct[: min(max(1, round(share * len(distinct))), limit, len(distinct) - 1)])
    train = [example for example, digest in zip(examples, digests, strict=True) if digest not in chosen]
    held_out = [example for example, digest in zip(examples, digests, strict=True) if digest in chosen]
    return train, held_out


def _first_by_digest(examples: Sequence[Example], limit: int) -> list[Example]:
    """``limit`` of the examples, the same ones each time and not the first of the file."""
    if len(examples) <= limit:
        return list(examples)
    return sorted(examples, key=_digest)[:limit]


def _digest(example: Example) -> bytes:
    return hashlib.sha256(repr((example["input_ids"], example["labels"])).encode()).digest()


# ---- batches


@dataclass(frozen=True)
class PadRight:
    """Make a batch: pad to the longest example, with labels that the loss leaves out. Trainer calls it a collator."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, int64 [examples, longest]."""
        longest = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for index, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(example["input_ids"])
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = torch.tensor(example["labels"])
        return batch
