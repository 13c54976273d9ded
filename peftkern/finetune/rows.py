"""Read rows of named columns from files and data sets. Every complaint says where in the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkern.finetune.errors import InputError


@dataclass(frozen=True)
class Row:
    """One record: its columns, and where it came from, for messages."""

    columns: Mapping[str, Any]
    place: str


TEXT_COLUMN = "text"
_TEXT_SUFFIXES = (".txt", ".md")


def is_running_text(data: str) -> bool:
    """Whether ``data`` is one long text, to be cut into blocks, and not a list of examples."""
    return Path(data).suffix.lower() in _TEXT_SUFFIXES


def read_rows(data: str, option: str, subset: str | None, split: str) -> list[Row]:
    """All rows of a file or of a data set on the hub.

    Args:
        data: path of a file, or name of a data set.
        option: what messages call it, for example ``"--data"``.
        subset, split: of a data set on the hub.

    Raises:
        InputError: there is no such file or data set, it is malformed, or it is empty.
    """
    path = Path(data).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{option}: {data} is a folder; give a file ({_known_suffixes()})")
    if path.exists() and reader is None:
        raise InputError(f"{option}: {data} has an unknown type {path.suffix!r}; known are {_known_suffixes()}")
    if not path.exists() and (reader is not None or _looks_like_path(data)):
        raise InputError(f"{option}: there is no file {data}")
    rows = list(_read_file(path, option, reader) if reader else _read_dataset(data, option, subset, split))
    if not rows:
        raise InputError(f"{option}: {data} is empty")
    return rows


def _looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or "\\" in data


def _known_suffixes() -> str:
    return ", ".join(_READERS)


def _read_file(path: Path, option: str, reader: Callable[[Path, str], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from reader(path, option)
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{option}: cannot read {path}: {error.strerror or error}") from error


def _read_json_lines(path: Path, option: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_json_line(line, f"{path}, line {number}", option)


def _parse_json_line(line: str, place: str, option: str) -> Row:
    try:
        columns = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{option}: {place}: not valid JSON ({reason}); each line must hold one object") from error
    if not isinstance(columns, dict):
        raise InputError(f"{option}: {place}: must be a JSON object with columns, got {_shorten(line)}")
    return Row(columns, place)


def _read_table(path: Path, option: str, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, path, option)
            for fields in reader:
                if fields:
                    yield _table_row(header, fields, f"{path}, line {reader.line_num}", option)
        except csv.Error as error:
            raise InputError(f"{option}: {path}, line {reader.line_num}: malformed ({error})") from error


def _check_header(header: list[str], path: Path, option: str) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(f"{option}: {path}: the first line names a column twice: {', '.join(repeated)}")


def _table_row(header: list[str], fields: list[str], place: str, option: str) -> Row:
    if len(fields) != len(header):
        raise InputError(f"{option}: {place}: {len(fields)} fields, but the first line names {len(header)} columns")
    return Row(dict(zip(header, fields, strict=True)), place)


def _read_csv(path: Path, option: str) -> Iterator[Row]:
    return _read_table(path, option, ",")


def _read_tsv(path: Path, option: str) -> Iterator[Row]:
    return _read_table(path, option, "\t")


def _read_text(path: Path, option: str) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield Row({TEXT_COLUMN: text}, str(path))


_READERS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    **dict.fromkeys(_TEXT_SUFFIXES, _read_text),
}


def _read_dataset(name: str, option: str, subset: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets raises a dozen types, and all of them mean that it cannot be had
        reason = _shorten(str(error) or type(error).__name__)
        raise InputError(
            f"{option}: {name} is neither a file nor a data set on the hub that can be loaded ({reason})"
        ) from error
    for index, columns in enumerate(rows):
        yield Row(columns, f"{name}, row {index}")


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
