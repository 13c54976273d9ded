from __future__ import annotations

import pytest

from peftkern.backends import cpu, registry


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every operation of the test runs on this backend, or the test fails."""
    if request.param == "cpu" and not cpu.available():
        pytest.skip(f"cpu backend: {cpu.unavailable_reason()}")
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)
