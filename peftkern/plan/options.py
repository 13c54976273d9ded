"""What can be chosen of a training run, as far as its memory and time depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftkern.plan.errors import PlanError

METHODS = ("lora", "full", "sparse")
QUANTIZATIONS = ("nf4", "fp4", "int8", "none")
OPTIMIZERS = ("AdamW", "AdamW8bit", "SGD")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """What is trained, and how. `peftkern.plan` says what each means.

    Attributes:
        method: one of `METHODS`; ``None``: a live model as it stands.
    """

    method: str | None
    rank: int
    target_modules: str | tuple[str, ...]
    density: float
    quantization: str
    block_size: int
    double_quant: bool
    dtype: str
    batch: int
    length: int
    gradient_checkpointing: bool
    optimizer: str
    logits: bool
    patched: bool
    labelled: float

    def __post_init__(self) -> None:
        choices = {
            "quantization": QUANTIZATIONS,
            "optimizer": OPTIMIZERS,
            "dtype": DTYPES,
            "method": (*METHODS, None),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise PlanError(f"{name} must be {_list(known)}; got {getattr(self, name)!r}")
        for name in ("rank", "batch", "length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("density", "labelled"):
            if not 0 < getattr(self, name) <= 1:
                raise PlanError(f"{name} must be above 0 and up to 1, got {getattr(self, name)!r}")
        if self.method == "full" and self.quantization != "none":
            raise PlanError(
                f"method='full' trains the weights, which must be dense; got quantization={self.quantization!r}"
            )
        if not self.logits and not self.patched:
            raise PlanError("logits=False is a form of the patched model; leave patched=True")


def _list(known: Sequence[str | None]) -> str:
    return "one of " + ", ".join(repr(name) for name in known if name is not None)
