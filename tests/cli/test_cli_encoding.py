"""What is learned: labels, chat templates, cutting, splitting, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import make_tokenizer, write_json_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.encoding import IGNORED, Example, PadRight, Splits, load_splits, split
from peftkern.finetune.errors import InputError

TOKENIZER = make_tokenizer()
PLAIN_TOKENIZER = make_tokenizer(chat_template=None)


def load(path: Path, tokenizer: Any = TOKENIZER, **changes: Any) -> Splits:
    config = FinetuneConfig(model="m", data=str(path), **{"eval_fraction": 0.0, **changes})
    return load_splits(config, tokenizer, config.max_length)


def rows(tmp_path: Path, *content: dict[str, Any]) -> Path:
    return write_json_lines(tmp_path / "rows.jsonl", list(content))


def whole(example: Example) -> str:
    return str(TOKENIZER.decode(example["input_ids"]))


def learned(example: Example) -> str:
    assert len(example["labels"]) == len(example["input_ids"])
    pairs = zip(example["labels"], example["input_ids"], strict=True)
    assert all(label in (IGNORED, token) for label, token in pairs)
    return str(TOKENIZER.decode([label for label in example["labels"] if label != IGNORED]))


def test_prompt_and_response_with_the_chat_template(tmp_path: Path) -> None:
    (example,) = load(rows(tmp_path, {"prompt": "what is it", "response": "the thing"})).train
    assert whole(example) == "<|user|>what is it</s>\n<|assistant|>the thing</s>\n"
    assert learned(example) == "the thing</s>"


def test_prompt_and_response_without_a_template(tmp_path: Path) -> None:
    path = rows(tmp_path, {"prompt": "what is it", "response": "the thing"})
    for tokenizer, changes in ((PLAIN_TOKENIZER, {}), (TOKENIZER, {"chat_template": False})):
        (example,) = load(path, tokenizer, **changes).train
        assert whole(example) == "what is it\nthe thing</s>"
        assert learned(example) == "the thing</s>"


def test_whole_example_is_learned_on_request(tmp_path: Path) -> None:
    path = rows(tmp_path, {"prompt": "what is it", "response": "the thing"})
    (example,) = load(path, response_only=False).train
    assert learned(example) == whole(example)


def test_all_answers_of_a_conversation_are_learned(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    (example,) = load(rows(tmp_path, {"messages": messages})).train
    assert learned(example) == "first</s>second</s>"


def test_text_is_learned_whole(tmp_path: Path) -> None:
    (example,) = load(rows(tmp_path, {"text": "the number"})).train
    assert whole(example) == learned(example) == "the number</s>"


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    path = rows(tmp_path, {"q": "what", "a": "that", "note": "text here"})
    (pair,) = load(path, prompt_column="q", response_column="a").train
    assert learned(pair) == "that</s>"
    (text,) = load(path, text_column="note").train
    assert learned(text) == "text here</s>"


def test_a_starting_token_is_put_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template=None)
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    (example,) = load(rows(tmp_path, {"prompt": "what", "response": "that"}), tokenizer).train
    assert example["input_ids"][0] == begin
    assert example["input_ids"].count(begin) == 1
    assert example["labels"][0] == IGNORED


def test_running_text_becomes_blocks_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("the question is the answer\n" * 9, encoding="utf-8")
    splits = load(path, max_length=16)
    assert [len(example["input_ids"]) for example in splits.train[:-1]] == [16] * (len(splits.train) - 1)
    assert "".join(whole(example) for example in splits.train) == path.read_text() + "</s>"
    assert splits.cut == splits.dropped == 0


def test_long_examples_are_cut_counted_and_dropped_when_nothing_is_left(tmp_path: Path) -> None:
    path = rows(
        tmp_path,
        {"prompt": "x", "response": "y"},
        {"prompt": "x", "response": "y" * 50},
        {"prompt": "x" * 50, "response": "y"},
    )
    splits = load(path, max_length=20)
    assert (len(splits.train), splits.cut, splits.dropped) == (2, 2, 1)
    assert max(len(example["input_ids"]) for example in splits.train) == 20


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"prompt": "x" * 50, "response": "y"}, {"max_length": 10}, "all labels are masked"),
        ({"q": "x", "a": "y"}, {}, "needs a column 'messages', or 'prompt' and 'response', or 'text'; there are: q, a"),
        ({"q": "x"}, {"text_column": "t"}, "there is no column 't'; there are: q"),
        ({"prompt": "x", "response": 3}, {}, "line 1: column 'response' must hold text, got int"),
        ({"messages": "hello"}, {}, "line 1: column 'messages' must hold a list of messages"),
        ({"messages": [{"role": "user"}]}, {}, "must have a 'role' and a 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "all labels are masked"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            {"chat_template": False},
            "need a chat template, and --no-chat-template turns it off",
        ),
        (
            {"text": "x", "prompt": "p", "response": "r"},
            {"text_column": "text", "prompt_column": "prompt", "response_column": "response"},
            "columns are named for prompt and response and for text",
        ),
    ],
)
def test_rows_that_cannot_be_learned(
    tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(rows(tmp_path, row), **changes)
    assert message in str(caught.value)


def test_a_later_row_without_the_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2: there is no column 'response'; there are: prompt"):
        load(rows(tmp_path, {"prompt": "x", "response": "y"}, {"prompt": "x"}))


def test_messages_need_a_template(tmp_path: Path) -> None:
    path = rows(tmp_path, {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(InputError, match="need a chat template, and the tokenizer has none"):
        load(path, PLAIN_TOKENIZER)


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="line 1: the chat template refuses these messages: roles must alternate"):
        load(rows(tmp_path, {"prompt": "x", "response": "y"}), tokenizer)


def test_a_template_that_changes_earlier_messages_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ messages|length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    with pytest.raises(InputError, match="use --no-response-only"):
        load(rows(tmp_path, {"prompt": "x", "response": "y"}), tokenizer)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(text, text)
@settings(max_examples=60)
def test_whatever_the_response_exactly_it_is_learned(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, response: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (example,) = load(rows(folder, {"prompt": prompt, "response": response})).train
    assert learned(example) == response + "</s>"
    assert whole(example) == f"<|user|>{prompt}</s>\n<|assistant|>{response}</s>\n"


# ---- the split


def examples(count: int) -> list[Example]:
    return [{"input_ids": [number, 1], "labels": [IGNORED, number]} for number in range(count)]


def test_split_depends_on_content_alone() -> None:
    train, held_out = split(examples(50), 0.2, 100)
    assert len(held_out) == 10
    assert train + held_out != examples(50)
    again_train, again_held_out = split(examples(50)[::-1], 0.2, 100)
    assert (again_train[::-1], again_held_out[::-1]) == (train, held_out)
    assert sorted(example["input_ids"] for example in train + held_out) == [[number, 1] for number in range(50)]


def test_equal_examples_stay_on_one_side() -> None:
    train, held_out = split(examples(10) * 3, 0.3, 100)
    assert len(held_out) == 9
    assert not [example for example in held_out if example in train]


@pytest.mark.parametrize(("share", "limit", "expected"), [(0.0, 9, 0), (0.01, 9, 1), (0.5, 3, 3), (0.99, 99, 9)])
def test_size_of_the_split(share: float, limit: int, expected: int) -> None:
    train, held_out = split(examples(10), share, limit)
    assert (len(train), len(held_out)) == (10 - expected, expected)


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(InputError, match="--eval-fraction: holding examples out takes two different ones"):
        split(examples(1) * 5, 0.1, 10)


def test_held_out_data_of_their_own(tmp_path: Path) -> None:
    path = rows(tmp_path, {"text": "one"})
    other = write_json_lines(tmp_path / "other.jsonl", [{"text": f"number {n}"} for n in range(5)])
    splits = load(path, eval_fraction=None, eval_data=str(other), max_eval_examples=3)
    assert [learned(example) for example in splits.train] == ["one</s>"]
    assert len(splits.held_out) == 3


# ---- batches


def test_batches_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    batch = PadRight(9)([{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
