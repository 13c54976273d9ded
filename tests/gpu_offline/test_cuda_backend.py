"""Which calls the CUDA backend takes, and what it says where its native module is missing or of no use."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_problem import Problem, make_problem
from torch import Tensor

from peftkern import ops
from peftkern.backends import cuda, registry
from peftkern.ops.lora_linear import Adapters, lora_linear_reference
from peftkern.ops.lora_linear_group import Member, lora_linear_group_reference


class OldGpu:
    """A native module without kernels for the GPU."""

    architectures = "80 90"

    def check_device(self, device: int) -> None:
        raise RuntimeError(f"no kernel image for device {device}")


def _pretend(monkeypatch: pytest.MonkeyPatch, native: Any, reason: str | None = None) -> None:
    """Every tensor is on a GPU, and ``native`` is the module."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(cuda, "_load", lambda: (native, reason))
    monkeypatch.setattr(cuda, "_device_objection", cuda._device_objection.__wrapped__)  # not what it remembers


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the module has kernels for."""
    _pretend(monkeypatch, SimpleNamespace(architectures="90", check_device=lambda _device: None))


def _problem(tokens: int = 2, **options: Any) -> Problem:
    return make_problem(
        tokens, 128, 64, [4], options.pop("weight", "nf4"), options.pop("dtype", torch.bfloat16), **options
    )


def _objection(problem: Problem) -> str | None:
    adapters = Adapters(problem.lora_A, problem.lora_B, problem.scaling, problem.dropout_p, None)
    return cuda._supports_lora_linear(problem.x, problem.weight, adapters, problem.bias)


# ---- what it takes


@pytest.mark.parametrize(("dtype", "most"), cuda.PREFERRED_TOKENS.items(), ids=str)
def test_few_tokens_of_a_four_bit_weight(on_gpu: None, dtype: torch.dtype, most: int) -> None:
    for weight in ("nf4", "fp4"):
        for double_quant in (False, True):
            for tokens in (0, 1, most):
                assert _objection(_problem(tokens, dtype=dtype, weight=weight, double_quant=double_quant)) is None


def test_without_adapters(on_gpu: None) -> None:
    problem = _problem()
    assert cuda._supports_lora_linear(problem.x, problem.weight) is None
    assert cuda._supports_lora_linear(problem.x, problem.weight, Adapters([], [], [], [], None), None) is None


def _with(**fields: Any) -> Problem:
    return replace(_problem(), **fields)


def _quantized_with(**fields: Any) -> Problem:
    problem = _problem()
    return replace(problem, weight=replace(problem.weight, **fields))


def _shifted_codes() -> Tensor:
    return torch.zeros(64 * 64 + 8, dtype=torch.uint8)[8:].view(64, 64)


ELSEWHERE = {
    "a weight that is not 4-bit": [lambda: _problem(weight="dense"), lambda: _problem(weight="int8")],
    "more than 16 tokens": [lambda: _problem(17), lambda: _problem(17, dtype=torch.float32)],
    "dropout": [lambda: _problem(dropout_p=0.1)],
    "float64": [lambda: _problem(5, dtype=torch.float64), lambda: _problem(5, factor_dtype=torch.float64)],
}
OBSTACLES = {
    "more than 4 adapters": [lambda: make_problem(1, 128, 64, [1] * 5, dtype=torch.float16)],
    "rows that are no whole number of blocks": [lambda: make_problem(1, 80, 64, [1], dtype=torch.float16)],
    "codes that are not contiguous and aligned to 16 bytes": [
        lambda: _quantized_with(packed=_problem().weight.packed.t().contiguous().t()),  # type: ignore[union-attr]
        lambda: _quantized_with(packed=_shifted_codes()),
    ],
    "float64": [lambda: _problem(1, factor_dtype=torch.float64), lambda: _with(bias=torch.zeros(64).double())],
}


@pytest.mark.parametrize("reason", ELSEWHERE)
def test_calls_that_another_backend_is_made_for(on_gpu: None, reason: str) -> None:
    for make in ELSEWHERE[reason]:
        objection = _objection(make())
        assert objection == reason
        assert isinstance(objection, registry.NotMeant)
        assert not isinstance(objection, registry.NotPreferred)


@pytest.mark.parametrize("reason", OBSTACLES)
def test_calls_that_it_cannot_run(on_gpu: None, reason: str) -> None:
    for make in OBSTACLES[reason]:
        objection = _objection(make())
        assert objection == reason
        assert not isinstance(objection, registry.NotMeant)


def test_more_tokens_run_only_where_the_backend_is_forced(on_gpu: None) -> None:
    problem = _problem(5)
    arguments = (problem.x, problem.weight, Adapters([], [], [], [], None), None)
    assert _objection(problem) == "more than 4 tokens"
    choice = registry.choose("lora_linear", *arguments)
    assert (choice.backend, choice.reason) == ("triton", "first choice")
    assert registry.choose("lora_linear", *arguments, backend="cuda").function is cuda.lora_linear
    with pytest.raises(registry.BackendError, match="cannot run this call: more than 16 tokens"):
        registry.choose("lora_linear", _problem(17).x, *arguments[1:], backend="cuda")


def _members(rows: tuple[int, ...], **options: Any) -> list[Member]:
    problems = [make_problem(1, 64, count, [4], "nf4", torch.bfloat16, **options) for count in rows]
    return [
        Member(one.weight, Adapters(one.lora_A, one.lora_B, one.scaling, one.dropout_p, None), one.bias)
        for one in problems
    ]


@pytest.mark.parametrize(
    ("tokens", "rows", "options", "expected"),
    [
        (1, (4096, 4096), {}, "cuda"),
        (2, (4096, 4096), {}, "triton"),
        (1, (4096, 1024, 1024), {}, "triton"),
        (1, (4096, 4096), {"dropout_p": 0.1}, "triton"),
    ],
)
def test_a_group_of_large_members_runs_one_by_one_for_a_single_token(
    on_gpu: None, tokens: int, rows: tuple[int, ...], options: dict[str, Any], expected: str
) -> None:
    x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    choice = registry.choose("lora_linear_group", x, _members(rows, **options))
    assert (choice.backend, choice.reason) == (expected, "first choice")


def test_the_results_of_a_group_are_those_of_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "lora_linear", lora_linear_reference)
    x, members = torch.randn(1, 64, dtype=torch.bfloat16), _members((48, 32))
    y, h = cuda.lora_linear_group(x, members)
    expected_y, expected_h = lora_linear_group_reference(x, members)
    assert torch.equal(h, expected_h)
    assert all(torch.equal(*pair) for pair in zip(y, expected_y, strict=True))


def test_quantize_and_dequantize_come_first(on_gpu: None) -> None:
    w = torch.zeros(2, 64)
    assert registry.choose("quantize", w, "nf4", 64, True).function is cuda.quantize
    q = ops.quantize(w, backend="reference")
    assert registry.choose("dequantize", q, torch.bfloat16).function is cuda.dequantize
    assert cuda._supports_dequantize(q, torch.float64) == "float64 results"


# ---- where it is of no use


def test_tensors_on_other_devices_are_none_of_its_business() -> None:
    w = torch.zeros(2, 64)
    assert cuda._supports_quantize(w) is registry.ELSEWHERE
    assert cuda._supports_dequantize(ops.quantize(w)) is registry.ELSEWHERE
    assert _objection(_problem()) is registry.ELSEWHERE
    assert cuda._supports_quantize(w.to("meta")) is registry.ELSEWHERE


def test_a_module_that_is_not_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, None, "not built")
    assert not cuda.available()
    assert cuda.architectures() == []
    objection = cuda._supports_quantize(torch.zeros(2, 64))
    assert objection == cuda.unavailable_reason() == "not built"
    assert not isinstance(objection, registry.NotMeant)  # so that the fallback is reported


def test_a_gpu_without_kernels_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, OldGpu())
    assert not cuda.available(3)
    expected = "the CUDA module, built for sm_80, sm_90, cannot be used (no kernel image for device 3)"
    assert cuda.unavailable_reason(3) == expected


def test_what_is_said_here() -> None:
    """Of the module as it is installed: built or not, and without a GPU of no use."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = cuda.unavailable_reason()
    built = cuda.architectures() != []
    assert reason is not None
    assert ("cannot be used" in reason) if built else ("not built or does not load" in reason)
