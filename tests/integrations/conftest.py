from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import load, make_llama

import peftkern


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved dense Llama."""
    folder = tmp_path_factory.mktemp("dense")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nf4_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, quantized while it was loaded, and saved."""
    folder = tmp_path_factory.mktemp("nf4")
    load(dense_folder, quantization_config=peftkern.QuantConfig("nf4")).save_pretrained(folder)
    return folder
