"""What executes the tests of this folder: a GPU, ttsem, or Triton's interpreter.

ttsem (https://pypi.org/project/ttsem) runs the IR that Triton compiles a kernel to, on CPU tensors, and checks bounds,
races between programs and undefined results. The interpreter, repaired, runs a kernel as Python.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU, TTSEM, INTERPRETER = "gpu", "ttsem", "interpreter"
NONE_HERE = (
    "no GPU, and neither ttsem nor Triton's interpreter runs this process: python tests/gpu_offline/execute.py does"
)


def current() -> str | None:
    """The executor of this process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    if torch.empty(0, device="cpu").is_cuda:  # every tensor says so within a session of ttsem
        return TTSEM
    return GPU if torch.cuda.is_available() else None


def describe(executor: str) -> str:
    """The executor with its versions, for the log."""
    triton = f"triton {importlib.metadata.version('triton')}"
    if executor == TTSEM:
        return f"ttsem {importlib.metadata.version('ttsem')} on the IR of {triton}"
    if executor == INTERPRETER:
        return f"the interpreter of {triton}, repaired"
    return f"{torch.cuda.get_device_name()} with {triton}"


class CudaIsCpu(TorchFunctionMode):
    """Lets code for a GPU run on CPU tensors: where it asks for the device "cuda" it gets the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        named = {name: _not_cuda(value) for name, value in (kwargs or {}).items()}
        return func(*map(_not_cuda, args), **named)


def _not_cuda(value: Any) -> Any:
    if not isinstance(value, str | torch.device) or not str(value).startswith("cuda"):
        return value
    return "cpu" if isinstance(value, str) else torch.device("cpu")


def stand_in_for_cuda() -> None:
    """Answer, to the end of this process, what code for a GPU asks PyTorch about it."""
    torch.cuda.get_device_name = lambda device=None: "no GPU"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]


def enter_ttsem() -> None:
    """Spare this process, to its end, what ttsem has no use for: the stages of Triton's compiler past the first.

    They take ten times as long as everything else. Ahead-of-time tests run them for every kernel.
    """
    from ttsem import harness

    def first_stage(record: Any, stage: str, target: Any) -> str:
        return harness.mlir.to_generic(harness._stage_text(record, stage, target), None)

    harness.mlir.enable_generic_printing()
    harness.ir_for_launch = first_stage


def enter_interpreter() -> None:
    """Prepare this process, to its end, for launches through the interpreter."""
    import interpreter_repair

    interpreter_repair.apply()
    Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    CudaIsCpu().__enter__()
