"""What can be chosen of a training run, as far as its memory and time depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftkern.plan.errors import PlanError

METHODS = ("lora", "full", "sparse")
FORMATS = ("nf4", "fp4", "int8")
QUANTIZATIONS = (*FORMATS, "none")
OPTIMIZERS = ("AdamW", "AdamW8bit", "SGD")
RECOMPUTE = ("mlp", "up")
LAYER_WORDS = ("layer", "mlp", "up", "store")
"""Of those that `peftkern.patch` takes for layers, the ones that can be followed. In this order they stand best: the
lower a layer, the less is kept while its backward pass needs room."""
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
    embeddings: str | None
    head: str | None
    dtype: str
    batch: int
    length: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    optimizer: str
    logits: bool
    recompute: str | tuple[str, ...] | None
    patched: bool
    labelled: float

    def __post_init__(self) -> None:
        choices = {
            "quantization": QUANTIZATIONS,
            "embeddings": (*FORMATS, None),
            "head": (*FORMATS, None),
            "optimizer": OPTIMIZERS,
            "dtype": DTYPES,
            "method": (*METHODS, None),
        }
        if isinstance(self.recompute, tuple):
            self._check_plan(self.recompute)
        else:
            choices["recompute"] = (*RECOMPUTE, None)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise PlanError(f"{name} must be {_list(known)}; got {getattr(self, name)!r}")
        for name in ("rank", "batch", "length", "gradient_accumulation"):
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
        if self.quantization == "none" and not self.embeddings is self.head is None:
            raise PlanError("embeddings and head are quantized along with the layers; give a quantization")
        if not self.patched and (not self.logits or self.recompute is not None):
            raise PlanError("logits=False and recompute are forms of the patched model; leave patched=True")
        if self.method is None and (not self.logits or self.recompute is not None or self.quantization != "none"):
            raise PlanError("a model is planned as it stands; name a method, or patch and quantize it before")

    def _check_plan(self, words: tuple[str, ...]) -> None:
        for word in words:
            if word not in LAYER_WORDS:
                raise PlanError(f"recompute: the word for a layer must be {_list(LAYER_WORDS)}; got {word!r}")
        if self.gradient_checkpointing:
            raise PlanError("recompute: with words for layers, 'layer' is what gradient_checkpointing=True does to all")


def _list(known: Sequence[str | None]) -> str:
    return "one of " + ", ".join(repr(name) for name in known if name is not None)
