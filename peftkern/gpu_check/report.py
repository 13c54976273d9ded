"""The report: one JSON file with everything, one Markdown file with a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftkern.backends.triton.devices import Rates
from peftkern.gpu_check.build import Build
from peftkern.gpu_check.numerics import Numerics
from peftkern.gpu_check.peers import ALL
from peftkern.gpu_check.rows import Row

JSON_NAME, MARKDOWN_NAME, LOG_NAME = "gpu-check.json", "gpu-check.md", "tests.log"


@dataclass
class Report:
    """What has been found so far."""

    device: str
    rates: Rates
    versions: dict[str, str | None]
    build: Build | None = None
    numerics: Numerics | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Row]:
        """Rows whose error is too large."""
        return [row for row in self.rows if not row.right]

    @property
    def passed(self) -> bool:
        """Whether everything that ran was right; what was skipped does not count."""
        tests = self.numerics is not None and self.numerics.right
        built = self.build is not None and self.build.failure is None
        return tests and built and not self.wrong and not self.failures

    def as_data(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "passed": self.passed,
            "device": self.device,
            "rates": asdict(self.rates),
            "versions": self.versions,
            "seconds": self.seconds,
            "build": None if self.build is None else asdict(self.build),
            "numerics": None if self.numerics is None else asdict(self.numerics),
            "failures": self.failures,
            "skipped": self.skipped,
            "notes": self.notes,
            "rows": [row.as_data(self.rates) for row in self.rows],
        }

    def write(self, folder: Path) -> None:
        """Write both files; earlier ones are replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_NAME).write_text(json.dumps(self.as_data(), indent=1) + "\n", encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(self.as_markdown(), encoding="utf-8")

    def as_markdown(self) -> str:
        """The report for people."""
        lines = [
            f"# {self.device}: {'passed' if self.passed else 'FAILED'}",
            "",
            f"{', '.join(f'{name} {version}' for name, version in self.versions.items())}; {self.seconds:.0f} s. "
            f"Fractions of the roofline are of the rates of {self.rates.model}.",
            "",
            *self._stage_lines(),
            *_table(self.rows, self.rates),
            *_list("Skipped", self.skipped),
        ]
        return "\n".join(lines) + "\n"

    def _stage_lines(self) -> list[str]:
        lines = [f"* {note}" for note in self.notes]
        if self.build is not None:
            lines.append(f"* build: {self.build.failure or 'done'}, {self.build.seconds:.0f} s")
        if self.numerics is not None:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in self.numerics.counts.items())
            lines.append(f"* tests: {counts or 'none ran'}, {self.numerics.seconds:.0f} s")
            lines += [f"  * {failure}" for failure in self.numerics.failures]
        lines += [f"* FAILED: {failure}" for failure in self.failures]
        wrong = [f"{row.kernel}, {row.shape}, {row.tokens} tokens: {row.error:.1e}" for row in self.wrong]
        lines += [f"* WRONG: {one}" for one in wrong]
        return [*lines, ""]


_HEADER = ("kernel", "shape", "tokens", "us", "TB/s", "TFLOP/s", "of roofline", "error")


def _table(rows: Sequence[Row], rates: Rates) -> list[str]:
    peers = [name for name in ALL if any(name in row.peers for row in rows)]
    header = (*_HEADER, *(f"{name} / ours" for name in peers))
    return [_line(header), _line(["---"] * len(header)), *(_line(_cells(row, rates, peers)) for row in rows)]


def _cells(row: Row, rates: Rates, peers: Sequence[str]) -> list[str]:
    cells = [
        row.kernel,
        row.shape,
        "" if row.tokens is None else str(row.tokens),
        f"{row.seconds * 1e6:.1f}",
        f"{row.moved / row.seconds / 1e12:.2f}",
        f"{row.flops / row.seconds / 1e12:.0f}" if row.flops else "",
        f"{row.roofline_fraction(rates):.0%}",
        "" if row.error is None else f"{row.error:.1e}" + ("" if row.right else " WRONG"),
    ]
    ratios = [row.peers[name] / row.seconds if name in row.peers else None for name in peers]
    return [*cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _list(title: str, entries: Sequence[str]) -> list[str]:
    return ["", f"{title}:", "", *(f"* {entry}" for entry in entries)] if entries else []
