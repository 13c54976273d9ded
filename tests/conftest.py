"""Shared by all tests: which native module runs, and which instruction sets could not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import peftkern
from peftkern.backends import cpu


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="require the native module built with sanitizers")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PEFTKERN_REQUIRE_NATIVE") == "1" and not cpu.available():
        raise pytest.UsageError(f"PEFTKERN_REQUIRE_NATIVE=1, but {cpu.unavailable_reason()}")
    if config.getoption("--sanitized") and "sanitized" not in Path(peftkern.__file__).parts:
        raise pytest.UsageError(f"--sanitized, but peftkern was imported from {peftkern.__file__}")


def pytest_report_header() -> list[str]:
    if not cpu.available():
        return [f"native CPU kernels: none ({cpu.unavailable_reason()})"]
    supported = cpu.supported_isas()
    skipped = [isa for isa in cpu.isa_names() if isa not in supported]
    return [
        f"native CPU kernels: {cpu.chosen_isa()} by default; threads of {cpu.thread_source()}",
        f"instruction sets tested: {', '.join(supported)}; not run on this processor: {', '.join(skipped) or 'none'}",
    ]
