"""Every backend, the CPU one once for each instruction set that was built: parameters of a `backend` fixture."""

from __future__ import annotations

import pytest

from peftkern.backends import cpu

ISA_BACKENDS = ["reference", *(f"cpu-{isa}" for isa in cpu.isa_names())]


def select(parameter: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend's name, with its instruction set forced; skips one that this processor does not run."""
    name, _, isa = parameter.partition("-")
    if isa:
        if isa not in cpu.supported_isas():
            pytest.skip(f"this processor does not run {isa}")
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, isa)
    return name
