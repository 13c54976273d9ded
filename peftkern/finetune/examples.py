"""From rows to what a model learns: text, and which parts of it count in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.errors import InputError
from peftkern.finetune.rows import TEXT_COLUMN, Row

ASSISTANT = "assistant"


@dataclass(frozen=True)
class MarkedText:
    """Text with the spans, in characters, that the loss counts.

    ``complete`` says that special tokens are already in it, as a chat template writes them.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    complete: bool


Marker = Callable[[Row], MarkedText]


class Kind(StrEnum):
    """What a row holds. The value names the settings that say in which columns."""

    MESSAGES = "messages"
    PAIR = "prompt and response"
    TEXT = "text"


def choose_marker(config: FinetuneConfig, rows: Sequence[Row], tokenizer: Any, option: str) -> Marker:
    """The way to read these rows: by the columns that the settings name, else by those that the first row has.

    Raises:
        InputError: a named column is missing, or the columns fit no known kind of data.
    """
    kind, columns = _roles(config, rows[0].columns, option)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if kind is Kind.TEXT:
        return lambda row: _mark_text(_text_of(row, columns[0], option), tokenizer)
    if config.chat_template and has_template:
        read = _messages if kind is Kind.MESSAGES else _as_messages
        return lambda row: _mark_messages(read(row, columns, option), row, config, tokenizer)
    if kind is Kind.PAIR:
        return lambda row: _mark_pair(row, columns, config, tokenizer, option)
    raise InputError(
        f"{option}: column {columns[0]!r} holds messages, which need a chat template, and "
        + ("--no-chat-template turns it off" if has_template else "the tokenizer has none")
        + "; give --prompt-column and --response-column, or --text-column"
    )


def _roles(config: FinetuneConfig, present: Mapping[str, Any], option: str) -> tuple[Kind, tuple[str, ...]]:
    named = _named_roles(config)
    if len(named) > 1:
        raise InputError(f"{option}: columns are named for {' and for '.join(named)}; name those of one kind only")
    for kind, columns in (named or _USUAL_COLUMNS).items():
        missing = [column for column in columns if column not in present]
        if not missing:
            return kind, columns
        if named:
            raise InputError(f"{option}: there is no column {missing[0]!r}; there are: {_list(present)}")
    raise InputError(
        f"{option}: needs a column 'messages', or 'prompt' and 'response', or 'text'; there are: {_list(present)}. "
        "Name yours with --messages-column, --prompt-column and --response-column, or --text-column"
    )


_USUAL_COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    Kind.MESSAGES: ("messages",),
    Kind.PAIR: ("prompt", "response"),
    Kind.TEXT: (TEXT_COLUMN,),
}


def _named_roles(config: FinetuneConfig) -> dict[Kind, tuple[str, ...]]:
    named: dict[Kind, tuple[str, ...]] = {}
    if config.messages_column is not None:
        named[Kind.MESSAGES] = (config.messages_column,)
    if config.prompt_column is not None and config.response_column is not None:
        named[Kind.PAIR] = (config.prompt_column, config.response_column)
    if config.text_column is not None:
        named[Kind.TEXT] = (config.text_column,)
    return named


def _list(columns: Mapping[str, Any]) -> str:
    return ", ".join(str(column) for column in columns) or "none"


def _text_of(row: Row, column: str, option: str) -> str:
    if column not in row.columns:
        raise InputError(f"{option}: {row.place}: there is no column {column!r}; there are: {_list(row.columns)}")
    value = row.columns[column]
    if not isinstance(value, str):
        raise InputError(f"{option}: {row.place}: column {column!r} must hold text, got {type(value).__name__}")
    return value


def _as_messages(row: Row, columns: Sequence[str], option: str) -> list[dict[str, str]]:
    prompt, response = columns
    return [
        {"role": "user", "content": _text_of(row, prompt, option)},
        {"role": ASSISTANT, "content": _text_of(row, response, option)},
    ]


def _messages(row: Row, columns: Sequence[str], option: str) -> list[dict[str, str]]:
    (column,) = columns
    messages = row.columns.get(column)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{option}: {row.place}: column {column!r} must hold a list of messages")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise InputError(
                f"{option}: {row.place}: every message in {column!r} must have a 'role' and a 'content' that are text"
            )
    return messages


# ---- marking what is learned


def _mark_text(text: str, tokenizer: Any) -> MarkedText:
    whole = text + (tokenizer.eos_token or "")
    return MarkedText(whole, ((0, len(whole)),), complete=False)


def _mark_pair(row: Row, columns: Sequence[str], config: FinetuneConfig, tokenizer: Any, option: str) -> MarkedText:
    """Prompt and response without a template: one after the other, on lines of their own."""
    prompt, response = (_text_of(row, column, option) for column in columns)
    prompt = prompt if prompt.endswith(("\n", " ")) or not prompt else prompt + "\n"
    whole = prompt + response + (tokenizer.eos_token or "")
    return MarkedText(whole, ((len(prompt) if config.response_only else 0, len(whole)),), complete=False)


def _mark_messages(messages: list[dict[str, str]], row: Row, config: FinetuneConfig, tokenizer: Any) -> MarkedText:
    whole = _render(messages, row, tokenizer, False)
    if not config.response_only:
        return MarkedText(whole, ((0, len(whole)),), complete=True)
    spans = [
        _response_span(messages, index, whole, row, tokenizer)
        for index, message in enumerate(messages)
        if message["role"] == ASSISTANT
    ]
    return MarkedText(whole, tuple(spans), complete=True)


def _render(messages: list[dict[str, str]], row: Row, tokenizer: Any, add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates are programs of the tokenizer's author and raise what they like
        raise InputError(f"{row.place}: the chat template refuses these messages: {error}") from error
    return text


def _response_span(messages: list[dict[str, str]], index: int, whole: str, row: Row, tokenizer: Any) -> tuple[int, int]:
    """Where the answer ``messages[index]`` stands: after what the model is prompted with, up to its end token."""
    prompt = _render(messages[:index], row, tokenizer, True)
    through = _render(messages[: index + 1], row, tokenizer, False)
    if not (through.startswith(prompt) and whole.startswith(through)):
        raise InputError(
            f"{row.place}: the tokenizer's chat template changes earlier messages when one is added, so the responses "
            "cannot be told apart; use --no-response-only, or --no-chat-template with prompt and response columns"
        )
    visible = through.rstrip()
    ends_itself = bool(tokenizer.eos_token) and visible.endswith(tokenizer.eos_token)
    return len(prompt), len(visible) if ends_itself else len(through)
