from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import Command, save_model, write_json_lines
from typer.testing import CliRunner, Result

from peftkern.cli.main import app


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and tests that run beside each other lose a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, still empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PEFTKERN_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output as in a file, also where the surroundings ask for colours."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty sums as prompt and response."""
    rows = [{"prompt": f"what is {n} plus one", "response": f"the answer is {n + 1}"} for n in range(40)]
    return write_json_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture
def command() -> Command:
    """Run the command line with these arguments."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run
