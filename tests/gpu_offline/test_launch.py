"""What Triton has compiled is launched again without asking Triton; stand-ins take the place of its objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern.backends.triton import launch
from peftkern.backends.triton.launch import Traffic


class Compiled:
    """Stands for what Triton compiled: notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class Kernel:
    """Stands for a ``@triton.jit`` function of four parameters; ``compiled`` is what each compilation gave."""

    __name__ = "kernel"
    arg_names = ("x", "sizes", "WIDE", "BLOCK")

    def __init__(self, gives: bool = True) -> None:
        self.compiled: list[Compiled] = []
        self._gives = gives

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*_arguments: Any, **_constants: Any) -> Compiled | None:
            self.compiled.append(Compiled())
            return self.compiled[-1] if self._gives else None

        return launched


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("triton.compiler")
    monkeypatch.setattr(compiler, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "_compiled", {})


def run(kernel: Kernel, x: Tensor, sizes: tuple[int, ...] = (5, 32), warps: int = 4, **constants: Any) -> None:
    constants = {"BLOCK": 64, "WIDE": False} | constants
    launch.launch(kernel, (3,), x, sizes, traffic=lambda: Traffic((x,), ()), num_warps=warps, num_stages=2, **constants)


def aligned(dtype: torch.dtype = torch.float32) -> Tensor:
    """Eight numbers at an address that 16 divides."""
    memory = torch.zeros(16, dtype=dtype)
    return memory[(-memory.data_ptr() % 16) // memory.element_size() :][:8]


def test_the_second_launch_takes_what_the_first_compiled_with_addresses_and_constants_in_order() -> None:
    kernel, x, other = Kernel(), aligned(), aligned()
    run(kernel, x)
    run(kernel, other, (7, 48))
    (compiled,) = kernel.compiled
    assert compiled.launches == [((3, 1, 1), other.data_ptr(), (7, 48), False, 64)]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": aligned(torch.bfloat16)},
        {"x": aligned()[1:]},
        {"sizes": (1, 32)},
        {"sizes": (16, 32)},
        {"sizes": (5, 33)},
        {"sizes": (1 << 31, 32)},
        {"sizes": (5, 1 << 63)},
        {"sizes": (5, 32, 32)},
        {"sizes": (5.0, 32)},
        {"sizes": (5, None)},
        {"warps": 8},
        {"BLOCK": 128},
        {"WIDE": True},
    ],
    ids=str,
)
def test_whatever_triton_compiles_for_anew_is_compiled_anew(changed: dict[str, Any]) -> None:
    kernel = Kernel()
    usual = {"x": aligned()}
    run(kernel, **usual)
    run(kernel, **(usual | changed))
    assert len(kernel.compiled) == 2


def test_kernels_are_not_taken_for_each_other() -> None:
    first, second = Kernel(), Kernel()
    run(first, aligned())
    run(second, aligned())
    assert (len(first.compiled), len(second.compiled)) == (1, 1)


def test_what_executes_kernels_in_tritons_place_is_asked_every_time() -> None:
    kernel = Kernel(gives=False)
    for _ in range(3):
        run(kernel, aligned())
    assert len(kernel.compiled) == 3


def test_the_constants_of_every_kernel_are_its_last_parameters() -> None:
    pytest.importorskip("triton")
    from peftkern.backends.triton.specializations import (
        ENTRIES,
        ENTRY_VARIANTS,
        EVERY_TILE,
        TENSORS,
        VARIANTS,
    )

    cases = EVERY_TILE + VARIANTS + TENSORS + ENTRIES + ENTRY_VARIANTS
    calls = [one.call for case in cases for one in case.record() if one.call is not None]
    assert calls
    for call in calls:
        last = call.kernel.arg_names[len(call.arguments) :]
        assert sorted(last) == sorted(call.constants), call.kernel.__name__


def test_a_launch_needs_a_tensor() -> None:
    with pytest.raises(TypeError, match="a tensor among its arguments"):
        launch.launch(Kernel(), (1,), (5, 7), traffic=lambda: Traffic((), ()), num_warps=4, num_stages=1)
