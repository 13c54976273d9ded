"""The executors of GPU kernels find the defects that they are there to find, and run whatever can run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import execute
import pytest

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parents[1]


def results_of(run: execute.Run, name: str, **environment: str) -> dict[str, str]:
    """What pytest says of each test of one file of this folder: PASSED, or FAILED and why."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        run.command(["-rA", "-p", "no:cacheprovider", str(FOLDER / name)]),
        env=inherited | run.environment | environment | {"COLUMNS": "1000"},
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    lines = re.findall(r"^(PASSED|FAILED) \S+?::test_(\w+(?:\[.+?\])?)(.*)$", result.stdout, re.MULTILINE)
    assert lines, result.stdout + result.stderr
    return {test: outcome + message for outcome, test, message in lines}


def passed(results: dict[str, str]) -> set[str]:
    return {test for test, result in results.items() if result == "PASSED"}


# ---- ttsem

FINDINGS = {
    "read_past_the_end": "reads 28 element(s) past the end of the tensor passed as `x`",
    "store_without_mask": "writes 28 element(s) past the end of the tensor passed as `out`",
    "race_between_programs": "program instances (0, 0, 0) and (1, 0, 0) both touch element 0 of `out`",
    "read_of_memory_nobody_wrote": "assert tensor(False)",
}


@pytest.fixture(scope="module")
def defects() -> dict[str, str]:
    if importlib.util.find_spec("ttsem") is None:
        pytest.skip("ttsem is not installed")
    return results_of(execute.TTSEM, "planted_defects.py")


@pytest.mark.parametrize("defect", FINDINGS)
def test_ttsem_finds(defects: dict[str, str], defect: str) -> None:
    assert defects[defect].startswith("FAILED")
    assert FINDINGS[defect] in defects[defect]


def test_ttsem_passes_what_is_right(defects: dict[str, str]) -> None:
    assert defects.keys() == {"none", *FINDINGS}
    assert passed(defects) == {"none"}


# ---- the interpreter


def test_stock_interpreter_is_wrong() -> None:
    """What the repair is for; a Triton that passes more than these needs less of it."""
    pytest.importorskip("triton")
    right = {"agrees_with_torch[absolute]", "agrees_with_torch[sum]", "agrees_with_torch[max]", "every_rounding"}
    assert passed(results_of(execute.INTERPRETER, "interpreter_cases.py")) == right


def test_repaired_interpreter_agrees_with_torch() -> None:
    pytest.importorskip("triton")
    results = results_of(execute.INTERPRETER, "interpreter_cases.py", REPAIR_THE_INTERPRETER="1")
    assert passed(results) == results.keys(), results


# ---- inline PTX


def test_no_kernel_has_inline_ptx() -> None:
    """No executor here reads PTX: a kernel with some needs a test of what it means for every input."""
    with_ptx = [path.name for path in execute.KERNELS.glob("*.py") if "inline_asm" in path.read_text()]
    assert len(list(execute.KERNELS.glob("*.py"))) > 1
    assert with_ptx == []


# ---- the driver


@pytest.mark.parametrize(
    ("importable", "titles"),
    [
        (("torch", "ttsem", "triton"), ["GPU"]),
        (("ttsem", "triton"), ["ttsem, part 1/2", "ttsem, part 2/2", "interpreter, a sample"]),
        (("triton",), ["interpreter, part 1/2", "interpreter, part 2/2"]),
    ],
)
def test_plan(monkeypatch: pytest.MonkeyPatch, importable: tuple[str, ...], titles: list[str]) -> None:
    monkeypatch.setattr(execute, "imports", lambda statement: re.split(r"[ .;]", statement)[1] in importable)
    assert [run.title for run in execute.plan(2)] == titles


def test_nothing_to_execute_with_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "imports", lambda statement: False)
    with pytest.raises(SystemExit, match="nothing here can execute"):
        execute.plan(2)


@pytest.mark.parametrize(
    ("code", "output", "complaint"),
    [
        (0, "12 passed", None),
        (1, "1 failed", "exit code 1"),
        (5, "no tests ran", "exit code 5"),
        (
            0,
            "ttsem: 2 launch(es) too large to be checked for races (over 4,000,000",
            "a launch was not checked for races",
        ),
    ],
)
def test_what_fails_a_run(code: int, output: str, complaint: str | None) -> None:
    assert execute.Outcome(execute.TTSEM, output, code, 1.0).complaint() == complaint


def test_a_kernel_that_no_test_executes_fails() -> None:
    everything = sorted(execute.all_kernels())
    assert "product_kernel" in everything
    halves = [f"kernels executed: {' '.join(everything[i::2])}" for i in (0, 1)]
    outcomes = [execute.Outcome(execute.TTSEM, output, 0, 1.0) for output in halves]
    assert execute.missing_kernels(outcomes) is None
    assert execute.missing_kernels(outcomes[:1]) == f"no test executes {', '.join(everything[1::2])}"


def test_no_test_executed_fails() -> None:
    result = execute.execute(execute.SECOND_OPINION, ["-k", "no_test_has_this_name", str(execute.TESTS)])
    assert result.complaint() == "exit code 5"


def test_without_executor_the_files_are_skipped_with_the_reason() -> None:
    if execute.imports("import torch; assert torch.cuda.is_available()"):
        pytest.skip("a GPU executes them")
    result = execute.execute(execute.Run("none", ("pytest",)), [str(execute.TESTS)])
    assert "tests/gpu_offline/execute.py does" in result.output
    assert "passed" not in result.output
