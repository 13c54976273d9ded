"""Fresh processes: what comes back, what they see of the environment, how they fail; and the runner on top."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkern.bench import BenchError, Benchmark, Quantity, Setting, fresh_process, runner

pytestmark = pytest.mark.usefixtures("importable_fakes")


def test_returns_a_value_whatever_is_printed_and_wherever_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fresh_process.call("fake_cases:chatty", {}, {}) == 7


def test_allocator_variables_are_replaced_and_others_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.top_pad=1")
    monkeypatch.setenv("PEFTKERN_TEST_VARIABLE", "kept")
    environment = fresh_process.child_environment({"MALLOC_MMAP_MAX_": "0"})
    assert "MALLOC_TOP_PAD_" not in environment
    assert "GLIBC_TUNABLES" not in environment
    assert environment["PEFTKERN_TEST_VARIABLE"] == "kept"
    seen = fresh_process.call("fake_cases:variable", {"name": "MALLOC_MMAP_MAX_"}, {"MALLOC_MMAP_MAX_": "0"})
    assert seen == "0"


def test_death_is_reported_with_the_last_output() -> None:
    with pytest.raises(BenchError, match=r"(?s)fake_cases:dies ended with exit code 3.*last words"):
        fresh_process.call("fake_cases:dies", {}, {})


def test_signal_is_reported() -> None:
    with pytest.raises(BenchError, match=r"ended by signal 6"):
        fresh_process.call("fake_cases:crashes", {}, {})


def test_error_after_a_value_keeps_the_value_and_its_message() -> None:
    values = fresh_process.stream("fake_cases:refuses", {}, {})
    assert next(values) == 1
    with pytest.raises(BenchError, match=r"^no such model$"):
        next(values)


def test_runner_labels_settings_and_takes_both_kinds_of_item() -> None:
    settings = (Setting(), Setting("tuned", {"MALLOC_MMAP_MAX_": "0"}))
    results = list(runner.run(Benchmark("fake", "", "fake_cases:timed_and_measured", settings, packages=())))
    assert [result.case for result in results] == [
        "nothing at all",
        "made up",
        "nothing at all (tuned)",
        "made up (tuned)",
    ]
    assert {result.name for result in results} == {"fake"}
    assert results[0].quantity is Quantity.TIME
    assert results[0].unit == "us"
    assert (results[1].ours, results[1].ratio, results[1].min, results[1].max) == (80.0, 0.8, 0.7, 0.9)
