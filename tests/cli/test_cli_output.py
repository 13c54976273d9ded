"""The output folder: checked before anything heavy, and never left worse than it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import file_size_limit

from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.errors import InputError, RunError
from peftkern.finetune.output import OutputFolder


def make(output: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(model="m", data="d", output=str(output), **changes)


def add_checkpoint(output: OutputFolder, step: int, state: str = "{}") -> Path:
    path = output.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(state)
    return path


def test_a_new_folder_is_made_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    for _ in range(2):
        output = OutputFolder.prepare(make(tmp_path / "a" / "b"))
        assert list(output.path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--output: .* is a file; give a folder"):
        OutputFolder.prepare(make(tmp_path / "file"))
    with pytest.raises(InputError, match=r"--output: cannot write to .*file/below: Not a directory"):
        OutputFolder.prepare(make(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="--output: cannot write to /proc/peftkern"):
        OutputFolder.prepare(make(Path("/proc/peftkern")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"--output: cannot write .*Permission denied"):
        OutputFolder.prepare(make(tmp_path))


def test_a_folder_that_holds_something_is_refused_unless_told(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match=r"is not empty; give another folder, --resume .* or --overwrite"):
        OutputFolder.prepare(make(tmp_path))
    OutputFolder.prepare(make(tmp_path, overwrite=True))
    assert (tmp_path / "mine").read_text() == "keep"


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text("first")

    output.replace("adapter", write)
    output.replace("note.txt", lambda path: path.write_text("one"))
    output.replace("note.txt", lambda path: path.write_text("two"))
    assert (tmp_path / "note.txt").read_text() == "two"

    def fail(folder: Path) -> None:
        write(folder)
        torch.save(torch.zeros(100_000), folder / "big.pt")

    for attempt in (fail, lambda path: path.write_bytes(b"0" * 100_000)):
        with (
            file_size_limit(10_000),
            pytest.raises(RunError, match=r"cannot write adapter to .* earlier results are as"),
        ):
            output.replace("adapter", attempt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "note.txt"]
    assert [path.name for path in (output.path / "adapter").iterdir()] == ["weights"]


def test_an_error_that_is_no_write_failure_passes_through(tmp_path: Path) -> None:
    def fail(_path: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        OutputFolder(tmp_path).replace("adapter", fail)
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints


def test_the_last_complete_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = OutputFolder(tmp_path)
    assert output.last_checkpoint() is None
    expected = add_checkpoint(output, 9)
    add_checkpoint(output, 5)
    add_checkpoint(output, 10, state="{")
    (output.checkpoints / "checkpoint-11").mkdir()
    assert output.last_checkpoint() == expected
    assert "checkpoint-11 is incomplete" in caplog.text
    output.remove_incomplete_checkpoints()
    assert sorted(path.name for path in output.checkpoints.iterdir()) == ["checkpoint-5", "checkpoint-9"]


def test_resuming_takes_a_checkpoint_and_the_same_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume: there is no checkpoint in"):
        OutputFolder.prepare(make(tmp_path, resume=True))
    output = OutputFolder.prepare(make(tmp_path, rank=8))
    output.start_checkpoints(make(tmp_path, rank=8), {"loss": 3.5})
    add_checkpoint(output, 5)
    resumed = OutputFolder.prepare(make(tmp_path, rank=8, resume=True, max_steps=9))
    assert resumed.read_facts() == {"loss": 3.5}
    with pytest.raises(InputError, match=r"--resume: --rank was 8 in the run in .* and is now 4"):
        OutputFolder.prepare(make(tmp_path, rank=4, resume=True))
    with pytest.raises(InputError, match="is not empty"):
        OutputFolder.prepare(make(tmp_path, rank=8))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 1, "facts": {}}', '{"settings": {}, "facts": 2}'])
def test_a_damaged_run_file_is_named(tmp_path: Path, content: str) -> None:
    output = OutputFolder(tmp_path)
    add_checkpoint(output, 5)
    (output.checkpoints / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        OutputFolder.prepare(make(tmp_path, resume=True))


def test_a_new_run_forgets_checkpoints_but_not_results(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    add_checkpoint(output, 5)
    (tmp_path / "summary.json").write_text("{}")
    config = make(tmp_path, overwrite=True)
    OutputFolder.prepare(config).start_checkpoints(config, {})
    assert output.last_checkpoint() is None
    assert json.loads((output.checkpoints / "run.json").read_text())["settings"]["rank"] == 16
    assert (tmp_path / "summary.json").exists()


def test_a_failed_run_leaves_only_what_can_be_used(tmp_path: Path) -> None:
    config = make(tmp_path / "out")
    output = OutputFolder.prepare(config)
    with pytest.raises(KeyboardInterrupt), output.discarded_on_failure():
        output.start_checkpoints(config, {})
        raise KeyboardInterrupt
    assert not output.path.exists()
    output = OutputFolder.prepare(config)
    with pytest.raises(KeyboardInterrupt), output.discarded_on_failure():
        output.start_checkpoints(config, {})
        add_checkpoint(output, 3)
        raise KeyboardInterrupt
    assert output.last_checkpoint() is not None
