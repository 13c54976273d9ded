"""The tests of this folder are written for a GPU; ``tests/gpu_offline/execute.py`` runs them without one.

Where nothing can execute a kernel they are skipped as files, unread, as Triton need not be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executor
import pytest
import torch

from peftkern.backends.triton import launch

EXECUTOR = executor.current()
if EXECUTOR in (executor.TTSEM, executor.INTERPRETER):
    executor.stand_in_for_cuda()
if EXECUTOR == executor.TTSEM:
    executor.enter_ttsem()
if EXECUTOR == executor.INTERPRETER:
    executor.enter_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="I/N: of N processes that share the tests, this is number I")
    parser.addoption("--sample", type=int, default=1, help="of each file, run one test in this many")


class _Unread(pytest.File):
    def collect(self) -> Any:
        pytest.skip(executor.NONE_HERE, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    return _Unread.from_parent(parent, path=module_path) if EXECUTOR is None else None


@pytest.hookimpl(trylast=True)  # after -k has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    part, parts = map(int, config.getoption("--part", "1/1").split("/"))
    kept = set(_sample(here, config.getoption("--sample", 1))[part - 1 :: parts])
    dropped = [item for item in here if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def _sample(items: list[pytest.Item], step: int) -> list[pytest.Item]:
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    return [item for of_file in by_file.values() for item in of_file[::step]]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the greatest whole number, wherever it is allocated."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # fills what `torch.empty` and its kin return
    yield
    torch.set_deterministic_debug_mode(before)


_kernels: set[str] = set()


@pytest.fixture(scope="session", autouse=True)
def _all_launches() -> Iterator[None]:
    """Remember which kernels the tests launch."""
    with launch.recording() as launches:
        yield
    _kernels.update(entry.kernel for entry in launches)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if EXECUTOR is not None:
        passed = len(terminalreporter.stats.get("passed", []))
        terminalreporter.write_line(f"executed by {executor.describe(EXECUTOR)}: {passed} tests passed")
        terminalreporter.write_line(f"kernels executed: {' '.join(sorted(_kernels))}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = reporter is None or any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error"))
    if EXECUTOR is not None and not ran:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
