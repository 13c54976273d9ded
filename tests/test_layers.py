"""Imports run one way, from the command line down to the formats (docs/development.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import peftkern

ROOT = Path(peftkern.__file__).parent
LAYERS = [
    *("formats", "ops", "optim", "nn", "patch", "integrations", "select", "sparse", "plan"),
    *("finetune", "tune", "bench", "gpu_check", "demo", "cli"),
]
"""From the lowest to the highest. `backends` stands beside them: whoever chooses a backend asks its registry."""


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "peftkern":
            names |= {f"peftkern.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("peftkern.")}


def test_no_layer_imports_a_higher_one() -> None:
    found = {layer: set[str]().union(*map(imported_packages, (ROOT / layer).rglob("*.py"))) for layer in LAYERS}
    assert all(found.values())
    for position, layer in enumerate(LAYERS):
        assert not found[layer] & set(LAYERS[position + 1 :]), layer


def test_backends_know_operations_and_formats_alone() -> None:
    found = set[str]().union(*map(imported_packages, (ROOT / "backends").rglob("*.py")))
    assert found & set(LAYERS) == {"formats", "ops"}
