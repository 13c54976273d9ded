"""The files that a run writes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from peftkern.bench import BenchError, Quantity, Result, report
from peftkern.bench.result import summarise

RESULTS = [
    summarise("linear", "1 token", "ms", Quantity.TIME, [4.0, 4.0, 5.0], [40.0, 44.0, 40.0]),
    summarise("memory", "peak | reset", "MB", Quantity.MEMORY, [800.0], [1000.0]),
    summarise("loss", "final loss", "nats", Quantity.LOSS, [2.0], [2.0]),
    summarise("loss", "largest difference", "relative", Quantity.DIFFERENCE, [3e-6], [0.0]),
    summarise("launches", "per layer", "launches", Quantity.COUNT, [30.0], [120.0]),
]


def test_json_has_exactly_the_documented_keys_and_values(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    report.write_json(RESULTS, path)
    rows = json.loads(path.read_text())
    assert len(rows) == len(RESULTS)
    assert all(set(row) == {"name", "case", "ours", "peer", "unit", "ratio", "min", "max"} for row in rows)
    assert rows[0] == {
        "name": "linear",
        "case": "1 token",
        "ours": 4.0,
        "peer": 40.0,
        "unit": "ms",
        "ratio": 10.0,
        "min": 8.0,
        "max": 11.0,
    }
    assert rows[1]["ratio"] == 0.8


def test_markdown_is_one_table_with_every_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.md"
    report.write_markdown(RESULTS, "some processor, 2 threads", path)
    lines = path.read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(RESULTS)
    assert table[2] == "| linear | 1 token | 4.00 | 40.0 | ms | 10.0x | 8.00 | 11.0 |"
    assert "peak \\| reset" in table[3]
    assert "some processor, 2 threads" in lines


@pytest.mark.parametrize("rows", [RESULTS, RESULTS[:1], RESULTS[3:4], []], ids=["all", "one", "difference", "none"])
def test_chart_is_a_png(rows: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "rows.png"
    report.write_chart(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_text("what was there before")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(BenchError, match="No space left on device"):
        report.write_json(RESULTS, path)
    assert path.read_text() == "what was there before"
    assert os.listdir(tmp_path) == ["rows.json"]


def test_written_file_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    report.write_json(RESULTS, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_check_writable_makes_folders_and_leaves_no_file(tmp_path: Path) -> None:
    report.check_writable(tmp_path / "new" / "rows.json")
    assert os.listdir(tmp_path / "new") == []


def test_check_writable_refuses_a_folder_and_a_file_as_parent(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="is a folder"):
        report.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write"):
        report.check_writable(tmp_path / "file" / "rows.json")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.1234, "0.123"),
        (0.01234, "0.0123"),
        (3e-6, "3.00e-06"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert report.number(value) == text


def test_machine_names_both_sides() -> None:
    text = report.describe_machine()
    assert "peft " in text
    assert "bitsandbytes " in text
    assert "threads" in text
