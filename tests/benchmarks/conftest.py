from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def importable_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fresh process import ``fake_cases``."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
