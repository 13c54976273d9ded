"""The folder that a run writes to. Nothing in it is replaced before what replaces it is complete."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkern.finetune.config import FinetuneConfig, option_name
from peftkern.finetune.errors import InputError, describe_write_failures

logger = logging.getLogger("peftkern")

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)$")
_TRAINER_STATE = "trainer_state.json"  # written last, so a checkpoint that has it is complete
_RUN_FILE = "run.json"

_MAY_CHANGE = frozenset(
    {"output", "overwrite", "resume", "checkpoint_every", "max_steps", "epochs", "max_eval_examples"}
)
"""Settings that a resumed run may have different from the run that it continues."""


class OutputFolder:
    """Results, ``summary.json``, ``loss.png`` and ``checkpoints/`` below one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @classmethod
    def prepare(cls, config: FinetuneConfig) -> OutputFolder:
        """Check everything about the folder that can be checked beforehand, and make it.

        Raises:
            InputError: it is no folder, cannot be written, holds something and neither ``overwrite`` nor ``resume`` is
                set, or there is nothing to resume.
        """
        folder = cls(Path(config.output).expanduser())
        if folder.path.exists() and not folder.path.is_dir():
            raise InputError(f"--output: {config.output} is a file; give a folder")
        try:
            if config.resume:
                folder._check_resumable(config)
            elif folder.path.exists() and any(folder.path.iterdir()) and not config.overwrite:
                raise InputError(
                    f"--output: {config.output} is not empty; give another folder, --resume to continue the run in it, "
                    "or --overwrite to replace it"
                )
            folder.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.path):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--output: cannot write to {config.output}: {reason}; give another folder") from error
        return folder

    @contextmanager
    def discarded_on_failure(self) -> Iterator[None]:
        """If this context fails, remove what nobody can use: checkpoints without a complete one, an empty folder."""
        try:
            yield
        except BaseException:
            if self.last_checkpoint() is None:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()
            raise

    # ---- results

    def replace(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Let ``write`` make a file or folder, then put it in the place of ``name``.

        Raises:
            RunError: it cannot be written; what was there before is there still.
        """
        target = self.path / name
        hint = "earlier results are as they were; free some space or choose another folder"
        if self.last_checkpoint() is not None:
            hint += f", and continue from {self.checkpoints} with --resume"
        with describe_write_failures(name, self.path, hint):
            staging = Path(tempfile.mkdtemp(prefix=".new-", dir=self.path))
            try:
                write(staging / name)
                _swap(staging / name, target, staging / f"old-{name}")
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return target

    # ---- checkpoints

    def start_checkpoints(self, config: FinetuneConfig, facts: dict[str, Any]) -> None:
        """Forget checkpoints of an earlier run, and note what the new one is, for :meth:`read_facts` on resuming.

        Raises:
            RunError: it cannot be written.
        """
        with describe_write_failures("checkpoints", self.path, "free some space"):
            if self.checkpoints.exists():
                shutil.rmtree(self.checkpoints)
            self.checkpoints.mkdir()
            content = {"settings": _settings_that_stay(config), "facts": facts}
            (self.checkpoints / _RUN_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")

    def read_facts(self) -> dict[str, Any]:
        """What the run that is resumed noted when it started."""
        facts: dict[str, Any] = self._read_run()["facts"]
        return facts

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        if not self.checkpoints.is_dir():
            return None
        numbered = [(_step_of(path), path) for path in self.checkpoints.iterdir() if _CHECKPOINT_NAME.match(path.name)]
        for _, path in sorted(numbered, reverse=True):
            if _is_complete(path):
                return path
            logger.warning("the checkpoint %s is incomplete and is left out", path)
        return None

    def remove_incomplete_checkpoints(self) -> None:
        """Remove what a failed attempt to write a checkpoint left."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not _is_complete(path):
                shutil.rmtree(path, ignore_errors=True)

    def _check_resumable(self, config: FinetuneConfig) -> None:
        if self.last_checkpoint() is None:
            raise InputError(f"--resume: there is no checkpoint in {self.checkpoints}; run without --resume")
        before, now = self._read_run()["settings"], _settings_that_stay(config)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"--resume: {option_name(name)} was {before.get(name)!r} in the run in {config.output} and is now "
                f"{now[name]!r}; resume with the same settings, or start again with --overwrite"
            )

    def _read_run(self) -> dict[str, Any]:
        path = self.checkpoints / _RUN_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content["settings"], dict) and isinstance(content["facts"], dict):
                return dict(content)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--resume: {path} is damaged ({error}); start again with --overwrite") from error
        raise InputError(f"--resume: {path} is damaged; start again with --overwrite")


def _settings_that_stay(config: FinetuneConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _MAY_CHANGE}


def _step_of(checkpoint: Path) -> int:
    match = _CHECKPOINT_NAME.match(checkpoint.name)
    return int(match.group(1)) if match else -1


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _swap(new: Path, target: Path, old: Path) -> None:
    """Put ``new`` in the place of ``target``, which moves to ``old``; undone if that fails."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
