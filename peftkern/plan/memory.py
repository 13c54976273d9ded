"""The memory of a training step, followed from operator to operator over tensors that have none.

Every storage that an operator makes is noted when it comes and when it goes. Operators of this package run through
their autograd functions, as in training; what stands in for a backend is the reference, of which what it returns
counts. So no formula says what a model keeps: autograd's own graph holds it.

The step is cut into segments: the forward pass, each layer's backward pass, and so on. In a model of equal layers the
peak of each segment grows linearly with the number of layers, and that of a deep model follows from two shallow ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkern.backends import registry
from peftkern.ops.lora_linear import counting_eager_calls
from peftkern.plan.errors import PlanError
from peftkern.plan.model import Subject, storage_of
from peftkern.plan.stand_ins import STAND_INS, run_operator
from peftkern.select.trace import model_loss

PARTS = ("weights", "adapters", "optimizer", "gradients", "activations", "loss", "scratch")
"""Where bytes go. ``activations`` and ``loss`` (logits, and what is made of them): kept by the forward pass for the
backward pass; ``loss`` also what lives while the loss is computed; ``scratch``: all that lives shorter."""

Parts = Mapping[str, float]


@dataclass
class Block:
    """Memory of a storage; times are counts of what came and went before."""

    number: int
    bytes: int
    born: int
    died: int | None = None
    part: str = "scratch"


@dataclass(frozen=True)
class Segment:
    """The parts of what was alive when it began, and at its peak."""

    start: dict[str, float]
    peak: dict[str, float]

    def with_parts(self, parts: Parts) -> Segment:
        """With these in place of its own of that name."""
        return Segment({**self.start, **parts}, {**self.peak, **parts})


@dataclass
class Record:
    """All that came and went in a step, and when its segments began."""

    blocks: list[Block] = field(default_factory=list)
    starts: list[tuple[int, str]] = field(default_factory=list)

    def segments(self) -> dict[str, Segment]:
        """By name; of several with one name that with the highest peak."""
        changes: list[tuple[int, int, Block]] = []
        for block in self.blocks:
            changes.append((block.born, block.bytes, block))
            if block.died is not None:
                changes.append((block.died, -block.bytes, block))
        changes.sort(key=lambda change: change[0])
        found: dict[str, Segment] = {}
        alive = dict.fromkeys(PARTS, 0.0)
        position = 0
        for (_, name), (end, _) in zip(self.starts, [*self.starts[1:], (self._end, "")], strict=True):
            total = sum(alive.values())
            highest = -1.0
            start = best = dict(alive)
            while position < len(changes) and changes[position][0] < end:
                _, size, block = changes[position]
                alive[block.part] += size
                total += size
                position += 1
                if size > 0 and total > highest:
                    highest, best = total, dict(alive)
            if name not in found or sum(best.values()) > sum(found[name].peak.values()):
                found[name] = Segment(start, best)
        return found

    @property
    def _end(self) -> int:
        return 1 + max((max(block.born, block.died or 0) for block in self.blocks), default=0)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that comes and goes inside of the with block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self._alive: dict[int, Block] = {}
        self._clock = 0
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run_operator(func, args, kwargs)
        if not self._paused:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.add(tensor)
        return out

    def add(self, tensor: Tensor, part: str = "scratch") -> None:
        """Note the memory of ``tensor``, unless it is known."""
        storage = tensor.untyped_storage()
        number = int(storage._cdata)
        if number in self._alive:
            return
        block = Block(number, storage.nbytes(), self._tick(), part=part)
        self._alive[number] = block
        self.record.blocks.append(block)
        weakref.finalize(storage, self._remove, block)

    def begin(self, segment: str) -> None:
        """From here on a segment of this name runs."""
        self.record.starts.append((self._tick(), segment))

    def alive(self) -> list[Block]:
        """What is alive now."""
        return list(self._alive.values())

    def run_operation(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of a backend."""
        if operation in STAND_INS:
            return STAND_INS[operation](*args, **kwargs)
        self._paused, before = True, self._paused
        try:
            out = registry.reference(operation)(*args, **kwargs)
        finally:
            self._paused = before
        if not before:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.add(tensor)
        return out

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _remove(self, block: Block) -> None:
        block.died = self._tick()
        if self._alive.get(block.number) is block:
            del self._alive[block.number]


def watch_step(subject: Subject, batch: Mapping[str, Tensor]) -> Record:
    """What comes and goes in forward and backward pass, without the optimizer's state."""
    model = subject.model
    watch = Watch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    watch.begin("start")
    with ExitStack() as stack:
        for tensor in (*model.parameters(), *model.buffers()):
            watch.add(tensor, _part_of(subject, tensor))
        stack.enter_context(_segments(subject, watch))
        stack.enter_context(counting_eager_calls())
        stack.enter_context(registry.standing_in(watch.run_operation))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(watch)
        stack.enter_context(torch.enable_grad())
        watch.begin("forward")
        loss = loss_of(model, batch)
        _name_kept(watch)
        watch.begin("backward of the loss")
        loss.backward()  # type: ignore[no-untyped-call]
        watch.begin("after backward")
        gradients = {storage_of(p.grad) for p in trained if p.grad is not None}
        for block in watch.alive():
            if block.number in gradients:
                block.part = "gradients"
        watch.add(torch.empty(0))  # so that the segment is not empty
    del loss
    for parameter in trained:
        parameter.grad = None
    return watch.record


def _part_of(subject: Subject, tensor: Tensor) -> str:
    return "adapters" if storage_of(tensor) in subject.added else "weights"


def of_a_layer(subject: Subject, optimizer_state: Callable[[Tensor], int]) -> tuple[Parts, Parts]:
    """What is there of one of the equal layers at any time, and the gradients of what is trained in it."""
    assert subject.layers is not None
    layer = subject.layers[-1]
    there, gradients = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for tensor in {storage_of(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}.values():
        there[_part_of(subject, tensor)] += tensor.untyped_storage().nbytes()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            there["optimizer"] += optimizer_state(parameter)
            gradients["gradients"] += parameter.nbytes
    return there, gradients


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch.

    Raises:
        PlanError: the model cannot run on tensors without numbers.
    """
    try:
        return model_loss(model, batch)
    except Exception as error:  # whatever the model does with numbers that are not there
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        raise PlanError(f"model: {type(model).__name__} cannot be followed without its numbers ({reason})") from error


def _name_kept(watch: Watch) -> None:
    """What the forward pass leaves alive is kept for the backward pass."""
    loss_began = max((time for time, name in watch.record.starts if name == "loss"), default=None)
    for block in watch.record.blocks:
        if loss_began is not None and block.born > loss_began:
            block.part = "loss"
        elif block.died is None and block.part == "scratch":
            block.part = "activations"


@contextmanager
def _segments(subject: Subject, watch: Watch) -> Iterator[None]:
    """Lets ``watch`` know when layers and the loss begin, in both passes."""
    handles = []
    layers: Sequence[nn.Module] = list(subject.layers) if subject.layers is not None else ()
    for index, layer in enumerate(layers):
        names = _layer_names(index, len(layers))
        handles.append(layer.register_forward_pre_hook(lambda *_, names=names: watch.begin(f"forward {names}")))
        handles.append(layer.register_forward_hook(_on_gradient(watch, f"backward {names}")))
    if layers:
        handles.append(layers[-1].register_forward_hook(lambda *_: watch.begin("behind the layers")))
    base = getattr(_innermost(subject.model), "base_model", None)
    if base is not None:
        handles.append(base.register_forward_hook(lambda *_: watch.begin("loss")))
        below = "backward of the last norm" if layers else "backward"
        handles.append(base.register_forward_hook(_on_gradient(watch, below)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _innermost(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _on_gradient(watch: Watch, segment: str) -> Callable[..., None]:
    """A forward hook: when the gradient of the output has been computed, ``segment`` begins."""

    def hook(_module: Any, _args: Any, output: Any) -> None:
        for tensor in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: watch.begin(segment))  # type: ignore[no-untyped-call]
                return

    return hook


def _layer_names(index: int, count: int) -> str:
    """Layers at the two ends have names that do not depend on the number of layers; those in between share one."""
    from_top = count - 1 - index
    if index < 2:
        return f"layer {index}"
    return f"layer {from_top} from the top" if from_top < 2 else "layers between"


def extrapolate(shallow: Mapping[str, Parts], deep: Mapping[str, Parts], more: int) -> dict[str, dict[str, float]]:
    """The peaks of a model with ``more`` layers more than ``deep``, which has one more than ``shallow``."""
    return {
        name: {part: deep[name][part] + more * (deep[name][part] - shallow[name][part]) for part in PARTS}
        for name in deep
        if name in shallow
    }
