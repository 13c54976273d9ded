"""What a plan says, as numbers, a table, a picture and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkern.patch.layer_plan import in_words
from peftkern.plan.devices import CPU
from peftkern.plan.options import Options

if TYPE_CHECKING:
    from rich.table import Table

MEANINGS: Mapping[str, str] = {
    "weights": "of the model, quantized or not",
    "adapters": "low-rank adapters or sparse deltas",
    "optimizer": "its state",
    "gradients": "of what is trained",
    "activations": "kept for the backward pass",
    "loss": "logits, and what is made of them",
    "scratch": "lives shorter",
}


@dataclass(frozen=True)
class Plan:
    """What training will take. ``str()`` is a table.

    Attributes:
        model: its name.
        options: what was planned for.
        device: as it was named.
        rates_measured: whether ``seconds`` follow from rates measured on this machine.
        device_memory: bytes; ``None``: not known here.
        beside: bytes that the device takes beside tensors at the peak; an estimate.
        load: bytes at the peak of loading.
        parts: bytes of each part at the peak of a training step, when the optimizer has its state.
        trained: how many numbers are trained.
        forward_flops, backward_flops: of a step; a multiply-add counts 2.
        bytes_moved: that operators of a step read and write.
        seconds: of a step without the optimizer; an estimate.
        budget: bytes that were to be kept to; ``None``: none.
    """

    model: str
    options: Options
    device: str
    rates_measured: bool
    device_memory: float | None
    beside: float
    load: float
    parts: Mapping[str, float]
    trained: int
    forward_flops: float
    backward_flops: float
    bytes_moved: float
    seconds: float
    budget: float | None = None

    @property
    def peak(self) -> float:
        """Bytes at the peak: all parts, and what is taken beside tensors."""
        return sum(self.parts.values()) + self.beside

    @property
    def flops(self) -> float:
        """Of a step."""
        return self.forward_flops + self.backward_flops

    @property
    def tokens_per_second(self) -> float:
        """An estimate."""
        o = self.options
        return o.gradient_accumulation * o.batch * o.length / self.seconds

    @property
    def fits(self) -> bool | None:
        """Whether loading and training fit into the budget, or else the device; ``None`` where both are not known."""
        room = self.budget if self.budget is not None else self.device_memory
        return None if room is None else max(self.peak, self.load) <= room

    def within(self, budget: float) -> Plan:
        """The same plan, kept to a budget in bytes."""
        return replace(self, budget=budget)

    def as_data(self) -> dict[str, Any]:
        """For a JSON file."""
        derived = {"peak": self.peak, "tokens_per_second": self.tokens_per_second, "fits": self.fits}
        return {**asdict(self), **derived}

    def table(self) -> Table:
        """A rich table with a row for each part."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", header_style="bold")
        table.add_column("memory")
        table.add_column("GB", justify="right")
        table.add_column("share", justify="right")
        table.add_column("")
        for name, value in self.parts.items():
            table.add_row(name, f"{value / 1e9:.3f}", f"{value / self.peak:.0%}", MEANINGS[name])
        if self.beside:
            share = f"{self.beside / self.peak:.0%}"
            table.add_row("beside", f"{self.beside / 1e9:.3f}", share, self.beside_is)
        table.add_section()
        table.add_row("peak of a step", f"{self.peak / 1e9:.3f}", "100%", self._verdict(), style="bold")
        table.add_row("peak of loading", f"{self.load / 1e9:.3f}", "", "")
        return table

    @property
    def beside_is(self) -> str:
        """What is taken beside tensors."""
        return "this process before the model" if self.device == CPU else "CUDA and its allocator, an estimate"

    @property
    def title(self) -> str:
        """What was planned."""
        o = self.options
        trained = {"lora": f"LoRA r={o.rank}", "full": "every weight", "sparse": f"{o.density:.2%} of the entries"}
        what = "as it stands" if o.method is None else f"{trained[o.method]}, {_quantization(o)}{o.dtype}"
        extras = [
            *([f"{o.gradient_accumulation} passes a step"] if o.gradient_accumulation > 1 else []),
            *(["gradient checkpointing"] if o.gradient_checkpointing else []),
            *(["no logits"] if not o.logits else []),
            *(f"{name} {format}" for name, format in (("embeddings", o.embeddings), ("head", o.head)) if format),
            *([f"{o.recompute} made again"] if isinstance(o.recompute, str) else []),
            *([in_words(o.recompute)] if isinstance(o.recompute, tuple) else []),
            *(["not patched"] if not o.patched else []),
        ]
        return ", ".join([f"{self.model}: {what}", f"{o.batch} x {o.length}", o.optimizer, *extras])

    def _verdict(self) -> str:
        if self.fits is None:
            return ""
        room, what = (self.budget, "the budget") if self.budget is not None else (self.device_memory, self.device)
        assert room is not None
        return f"{'fits' if self.fits else 'does not fit'} into {what}, {room / 1e9:g} GB"

    @property
    def speed(self) -> str:
        """A line on the work of a step, and how long it takes."""
        source = "rates measured on this machine" if self.rates_measured else "derated figures of its maker"
        return (
            f"{self.trained / 1e6:.2f} million numbers trained. A step: {self.flops / 1e12:.3g} TFLOP; on "
            f"{self.device}, an estimate from {source}: {self.seconds:.3g} s, {self.tokens_per_second:.0f} tokens/s"
        )

    @property
    def patch_call(self) -> str:
        """The line of Python that patches a model as planned; empty where nothing is patched."""
        o = self.options
        if o.method is None or not o.patched:
            return ""
        logits = [] if o.logits else ["logits=False"]
        return f"peftkern.patch({', '.join(['model', *logits, *_recompute_argument(o.recompute)])})"

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=120)
        console.print(self.table())
        lines = "\n".join(filter(None, [self.speed, self.patch_call]))
        return f"{console.file.getvalue()}{lines}"  # type: ignore[attr-defined]

    def save(self, path: str | Path) -> None:
        """Write ``.png`` (a bar of the parts) or ``.json`` (all numbers).

        Raises:
            ValueError: the file name has another ending.
            OSError: it cannot be written.
        """
        target = Path(path)
        ending = target.suffix.lower()
        if ending == ".json":
            target.write_text(json.dumps(self.as_data(), indent=1) + "\n", encoding="utf-8")
        elif ending == ".png":
            from peftkern.plan.chart import draw

            draw([self], target)
        else:
            raise ValueError(f"Plan.save: path must end in .png or .json, got {str(path)!r}")


def _recompute_argument(recompute: str | tuple[str, ...] | None) -> list[str]:
    if recompute is None:
        return []
    if isinstance(recompute, str):
        return [f'recompute="{recompute}"']
    runs = [(word, len(list(group))) for word, group in groupby(recompute)]
    return ["recompute=" + " + ".join(f'["{word}"] * {count}' for word, count in runs)]


def _quantization(options: Options) -> str:
    return "" if options.quantization == "none" else f"{options.quantization} in "
