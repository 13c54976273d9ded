"""Progress on the terminal: bars where there is one, lines where the output goes to a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINES_PER_RUN = 10


@dataclass
class Reporter:
    """Reports one activity at a time to ``console``."""

    console: Console
    _progress: Progress | None = field(default=None, init=False)
    _task: TaskID = field(default=TaskID(0), init=False)
    _what: str = field(default="", init=False)
    _total: int = field(default=0, init=False)
    _done: int = field(default=0, init=False)

    @contextmanager
    def activity(self, what: str, total: int) -> Iterator[Reporter]:
        """Show a bar for ``what``, ``total`` steps long, while in this context."""
        self._what, self._total, self._done = what, total, 0
        if not self.console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task(what, total=total, note="")
            try:
                yield self
            finally:
                self._progress = None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say ``what`` goes on in this context, whose length is not known."""
        self.say(what)
        with self.console.status(""):  # shows on a terminal only
            yield

    def expect(self, total: int, done: int) -> None:
        """Correct what the activity was started with."""
        self._total, self._done = total, done
        if self._progress is not None:
            self._progress.update(self._task, total=total, completed=done)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Say that ``steps`` more are done; ``note`` is shown beside; in a file, only steps that have one show."""
        before, self._done = self._done, self._done + steps
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, note=note)
            return
        stride = max(1, self._total // _LINES_PER_RUN)
        if note and before // stride != self._done // stride:
            self.say(f"{self._what}: {self._done}/{self._total} {note}")

    def show(self, renderable: object) -> None:
        """Print a table."""
        self.console.print(renderable, highlight=False)

    def say(self, text: str) -> None:
        """Print a line; square brackets are printed as they are."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
