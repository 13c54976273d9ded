"""Reading files of every kind, and what is said about broken ones."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import write_json_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.finetune.errors import InputError
from peftkern.finetune.rows import Row, read_rows


def read(path: Path | str) -> list[Row]:
    return read_rows(str(path), "--data", None, "train")


def columns(path: Path) -> list[Any]:
    return [row.columns for row in read(path)]


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_with_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '\ufeff{"text": "ä"}\n\n{"text": "b", "n": 1}\n')
    rows = read(path)
    assert [row.columns for row in rows] == [{"text": "ä"}, {"text": "b", "n": 1}]
    assert rows[1].place == f"{path}, line 3"


def test_csv_with_quoted_line_breaks(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", 'prompt,response\n"one\ntwo","a, b"\n\nthree,c\n')
    assert columns(path) == [{"prompt": "one\ntwo", "response": "a, b"}, {"prompt": "three", "response": "c"}]


def test_tab_separated(tmp_path: Path) -> None:
    assert columns(put(tmp_path, "a.tsv", "prompt\tresponse\na, b\tc\n")) == [{"prompt": "a, b", "response": "c"}]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_plain_text_is_one_row(tmp_path: Path, name: str) -> None:
    assert columns(put(tmp_path, name, "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "prompt,response\n", "a.csv is empty"),
        ("a.txt", " \n ", "a.txt is empty"),
        ("a.jsonl", '{"a": 1}\n{"a" 2}\n', "line 2: not valid JSON (Expecting ':' delimiter at column 6)"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: must be a JSON object with columns, got [1, 2]"),
        ("a.jsonl", b'{"a": "\xff"}\n', "is not UTF-8 text"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the first line names 2 columns"),
        ("a.csv", "a,b\n1\n", "line 2: 1 fields, but the first line names 2 columns"),
        ("a.csv", "a,a\n1,2\n", "names a column twice: a"),
        ("a.csv", 'a,b\n"1"x,2\n', "line 2: malformed"),
        ("a.parquet", "x", "unknown type '.parquet'; known are .jsonl"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(put(tmp_path, name, content))
    assert message in str(caught.value)
    assert str(caught.value).startswith("--data: ")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/file", "a/b/c"])
def test_missing_file(name: str) -> None:
    with pytest.raises(InputError, match=f"there is no file {name}"):
        read(name)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; give a file \(\.jsonl"):
        read(tmp_path)


def test_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, subset, split))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("someone/things", "--data", "small", "train")
    assert asked == [("someone/things", "small", "train")]
    assert [row.columns for row in rows] == [{"text": "a"}, {"text": "b"}]
    assert rows[1].place == "someone/things, row 1"


def test_unknown_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_arguments: Any, **_options: Any) -> None:
        raise FileNotFoundError("no such\ndata set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"someone/things is neither a file nor a data set .* \(no such data set\)"):
        read("someone/things")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=3), min_size=1, max_size=5))
@settings(max_examples=40)
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = write_json_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)
    assert columns(path) == rows


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\ufeff"), min_size=1, max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
@settings(max_examples=40)
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("one", "two"), *rows])
    path = put(tmp_path_factory.mktemp("rows"), "a.csv", text.getvalue())
    assert columns(path) == [{"one": one, "two": two} for one, two in rows]


@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".csv", ".tsv", ".txt"]))
def test_any_bytes_give_rows_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = put(tmp_path_factory.mktemp("rows"), f"a{suffix}", content)
    try:
        rows = read(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    assert rows
    for row in rows:
        assert json.dumps(row.columns)
