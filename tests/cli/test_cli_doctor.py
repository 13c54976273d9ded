"""``peftkern doctor`` and the entry points."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
import torch
from cli_helpers import Command

import peftkern
from peftkern.backends import cpu, cuda, registry
from peftkern.backends.triton import launch, register
from peftkern.cli import facts, gpu_facts


def test_facts_as_json(command: Command) -> None:
    result = command("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["usable"] is True
    assert found["versions"]["peftkern"] == peftkern.__version__
    assert found["versions"]["torch"]
    assert found["cpu"]["threads"] >= 1
    assert found["cpu"]["native_module"] is cpu.available()
    assert set(found["cpu"]["supported"]) <= set(found["cpu"]["built"])
    assert found["cpu"]["chosen"] in [*found["cpu"]["supported"], None]
    assert {row["backend"] for row in found["operations"]} <= set(registry.PREFERENCE)


def test_every_operation_has_a_typical_call() -> None:
    assert {operation for operation, *_ in facts.typical_calls()} == set(registry.operations())


def test_the_table_names_versions_and_operations(command: Command) -> None:
    result = command("doctor")
    assert result.exit_code == 0
    for word in (
        "python",
        "torch",
        "transformers",
        "peft",
        "instruction sets built",
        "threads",
        "lora_linear_backward",
    ):
        assert word in result.output


def test_kernels_for_gpus_are_named_without_a_gpu(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "architectures", lambda: ["80", "90"])
    monkeypatch.setattr(register, "unavailable_reason", lambda: None)
    found = json.loads(command("doctor", "--json").stdout)
    assert found["gpu_kernels"]["cuda"] == {"built_for": ["80", "90"], "missing_because": None}
    assert "120" in found["gpu_kernels"]["triton"]["compiles_for"]
    shown = command("doctor").output
    assert "built for sm_80, sm_90" in shown
    assert "compiled at first use, for sm_80" in shown


def test_why_kernels_for_gpus_are_missing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "architectures", list)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "no nvcc was there")
    monkeypatch.setattr(register, "unavailable_reason", lambda: "triton is not installed")
    found = json.loads(command("doctor", "--json").stdout)
    assert found["gpu_kernels"]["cuda"]["missing_because"] == "no nvcc was there"
    assert found["gpu_kernels"]["triton"] == {"compiles_for": [], "missing_because": "triton is not installed"}
    shown = command("doctor").output
    assert "no nvcc was there" in shown
    assert "triton is not installed" in shown


def test_what_would_run_on_a_gpu_by_tokens(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch.recording():  # tensors without memory then count as on an H100
        products = list(gpu_facts.products("meta"))
    assert len(products) == 6
    for product in products:
        assert product.kernels.startswith(("triton (few) to 64 tokens, ", "triton (fused) to "))
        assert product.kernels.endswith("triton (staged)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_facts, "products", lambda _device: iter(products))
    shown = command("doctor").output
    assert "what would run on the GPU" in shown
    assert "nf4 4096x14336" in shown


def test_a_missing_native_module_is_loud_and_usable(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "no compiler was found")
    for cached in (cpu.instruction_sets, cpu._resolve_isa):
        cached.cache_clear()
    try:
        result = command("doctor")
        found = json.loads(command("doctor", "--json").stdout)
    finally:
        cpu.instruction_sets.cache_clear()
    assert result.exit_code == 0
    assert result.output.startswith(" WARNING ")
    assert "no compiler was found" in result.output
    assert found["cpu"]["native_module"] is False
    # the loss is made of PyTorch's own products and needs no native module
    others = [row for row in found["operations"] if row["operation"] != "linear_cross_entropy"]
    assert {row["backend"] for row in others} == {"reference"}


def test_what_cannot_run_is_said_and_fails(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_BACKEND", "abacus")
    result = command("doctor")
    assert result.exit_code == 1
    assert "some operations cannot run at all" in result.output
    assert "PEFTKERN_BACKEND must be one of" in " ".join(result.output.split())


def test_a_forced_instruction_set_that_does_not_exist(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip("there is no native module to force")
    monkeypatch.setenv("PEFTKERN_CPU_ISA", "sse1")
    result = command("doctor")
    assert "no instruction set can be used" in result.output
    assert "sse1" in result.output


def test_version_and_help(command: Command) -> None:
    assert command("--version").stdout == f"peftkern {peftkern.__version__}\n"
    shown = command("--help")
    assert shown.exit_code == 0
    for name in ("demo", "finetune", "bench", "tune", "doctor"):
        assert name in click.unstyle(shown.output)


def test_python_dash_m_and_lazy_imports() -> None:
    """Help must come quickly, so nothing heavy may be imported for it."""
    program = (
        "import runpy, sys; sys.argv = ['peftkern', '--version']\n"
        "try: runpy.run_module('peftkern', run_name='__main__')\n"
        "except SystemExit as leaving: assert not leaving.code, leaving.code\n"
        "print(sorted({'transformers', 'peft', 'datasets', 'matplotlib', 'bitsandbytes'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == f"peftkern {peftkern.__version__}\n[]\n"
