"""Watch one forward and backward pass, and find for each operator the tensors whose training makes it run.

A node of autograd's graph runs where a trained tensor lies below one of its edges, and computes the gradient of each
such edge. The operators that run inside of a node, and what they hand to each other, tell which of them the gradient
of an edge needs: the product that makes dX belongs to the tensors below x, the one that makes dW to W. So each piece
of work has the set of tensors of which at least one must be trained for it to be done:

    cost(S) = Σ over pieces of work of cost · [S ∩ tensors ≠ ∅]

That holds for any graph, with branches, residual connections and tensors that are used twice. Sums of gradients that
reach a node from several sides belong to the node. What gradient checkpointing computes again belongs to all tensors
below the nodes of its region that need something saved. Gradients that an operator of the forward pass makes already
(`linear_cross_entropy`) are charged where the backward pass reads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkern.select.flops import Part, parts_of

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss, a tensor of one number, of a batch."""


class Meter(Protocol):
    """Measures each operator, beside what is counted."""

    def start(self) -> None: ...
    def stop(self, kind: Hashable) -> None:
        """The operator that began at the last `start` has ended; ``kind``: what it is, and of which shapes."""


@dataclass(frozen=True)
class Charge:
    """A piece of work of the backward pass.

    Attributes:
        tensors: bit set of the tensors of which one must be trained for this to be done, in the order of
            `Trace.names`; the bit behind the last stands for what asks for a gradient in any case.
        flops: of this piece.
        call: which of the pass's operators did it, counted from 0, the forward pass among them.
        share: this piece's part of the operator's work.
    """

    tensors: int
    flops: float
    call: int
    share: float


@dataclass
class Trace:
    """What was seen.

    Attributes:
        names: of the tensors that can be trained.
        order: their indices in the order in which gradients were computed; those without one at the end.
        forward_flops: of the forward pass, without the gradients that it makes already.
        charges: of the backward pass, and of those gradients.
    """

    names: tuple[str, ...]
    order: list[int] = field(default_factory=list)
    forward_flops: float = 0.0
    charges: list[Charge] = field(default_factory=list)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """``model(**batch).loss``.

    Raises:
        ValueError: the model returns none.
    """
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "model(**batch) gave no loss for this batch; give it labels, or pass a function as loss. The Trainer keeps "
            "labels from the model with label_smoothing_factor and with compute_loss_func"
        )
    return loss


def trace(
    model: nn.Module, batch: Batch, names: Sequence[str], loss: Loss = model_loss, meter: Meter | None = None
) -> Trace:
    """Run forward and backward with the parameters of ``names`` trained and no others; no gradient is stored.

    The caller puts back what the forward pass of the model changes (`left_alone`).

    Raises:
        ValueError: the loss depends on none of them, or a region of the model is checkpointed in the reentrant way,
            whose graph autograd hides.
    """
    parameters = dict(model.named_parameters())
    found = Trace(tuple(names))
    watch = _Watch(found, meter)
    with asking(model, names), without_hooks(model), torch.enable_grad(), watch:
        value = loss(model, batch)
        watch.end_forward()
        if value.grad_fn is None:
            raise ValueError("record: the loss depends on no candidate; is the forward pass under torch.no_grad()?")
        graph = _walk(value.grad_fn, {id(parameters[name]): index for index, name in enumerate(names)})
        watch.run_backward(value, graph)
    found.order += [index for index in range(len(names)) if index not in set(found.order)]
    return found


@contextlib.contextmanager
def asking(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The parameters of ``names``, and no others, require a gradient inside of the with block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = set(names)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextlib.contextmanager
def gradients_put_aside(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient at the start of the with block; afterwards each has its own again."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


_STATISTICS = 1 << 16
"""Elements of the largest buffer that a forward pass is expected to change; larger ones are weights."""


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Random number generators and what the modules hold are as before afterwards, buffers changed in place too."""
    held = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    values = [(b, b.detach().clone()) for b in model.buffers() if b.numel() <= _STATISTICS]
    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, *contents in held:
                places: tuple[dict[str, Any], ...] = (module.__dict__, module._parameters, module._buffers)
                for now, was in zip(places, contents, strict=True):
                    now.clear()
                    now.update(was)
            for buffer, value in values:
                buffer.data.copy_(value)
            torch.clear_autocast_cache()


_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""Names of the hooks through which `transformers` and `peft` let the embeddings' output ask for a gradient."""


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """The hooks that let the embeddings' output ask for a gradient are off inside of the with block."""
    held = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    try:
        for hooks, all_hooks in held:
            for key, hook in all_hooks.items():
                if getattr(hook, "__name__", "") in _HOOKS:
                    del hooks[key]
        yield
    finally:
        for hooks, all_hooks in held:
            hooks.clear()
            hooks.update(all_hooks)


# ---- autograd's graph


@dataclass
class _Node:
    """A node that is not a leaf. ``edges`` are the bit sets of tensors below each of its edges."""

    function: Any
    edges: list[int]
    leaves: list[tuple[int, int]]
    """(edge, index of the tensor) of the edges that end in a tensor that can be trained."""
    region: Any = None

    @property
    def tensors(self) -> int:
        return _union(self.edges)


@dataclass
class _Graph:
    nodes: list[_Node]
    leaves: list[tuple[Tensor, int]]
    """Every leaf, and its bit set."""


def _union(sets: Any) -> int:
    union = 0
    for each in sets:
        union |= each
    return union


def _walk(root: Any, bits: Mapping[int, int]) -> _Graph:
    """All nodes below ``root``. ``bits``: index of a parameter that can be trained, by its id."""
    below: dict[Any, int] = {}
    leaf_of: dict[Any, int] = {}
    graph = _Graph([], [])
    waiting = [(root, False)]
    while waiting:
        function, children_done = waiting.pop()
        if function in below:
            continue
        children = [child for child, _ in function.next_functions]
        if function.name() == "torch::autograd::AccumulateGrad":
            index = leaf_of[function] = bits.get(id(function.variable), len(bits))
            below[function] = 1 << index
            graph.leaves.append((function.variable, below[function]))
        elif not children_done:
            _check_open(function)
            waiting.append((function, True))
            waiting += [(child, False) for child in children if child is not None and child not in below]
        else:
            edges = [0 if child is None else below[child] for child in children]
            leaves = [(edge, leaf_of[c]) for edge, c in enumerate(children) if leaf_of.get(c, len(bits)) < len(bits)]
            below[function] = _union(edges)
            graph.nodes.append(_Node(function, edges, leaves))
    return graph


def _check_open(function: Any) -> None:
    if function.name().startswith("CheckpointFunction"):
        raise ValueError(
            "record: gradient checkpointing in the reentrant way hides the graph of its regions; use "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def _saves(function: Any) -> bool:
    """Whether the node keeps a tensor for its backward pass."""
    names = (name for name in dir(function) if name.startswith("_raw_saved_"))
    return any(bool(getattr(function, name)) for name in names)


# ---- watching


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: Trace, meter: Meter | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.meter = meter
        self.calls = 0
        self.note: Callable[[Any, Any, Any, Any], None] = self._note_forward
        self.regions: dict[int, Any] = {}  # by the number of the node that was made in it
        self.window: _Window | None = None
        self.sums: dict[int, list[Charge]] = {}  # of gradients that were added up, by their memory
        self.again: list[tuple[Any, Charge]] = []  # what was computed again, by region
        self.made: dict[int, list[Charge]] = {}  # of gradients that the forward pass has made, by their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.meter is not None:
            self.meter.start()
        out = func(*args, **kwargs)
        if self.meter is not None:
            self.meter.stop((func, *(tensor.shape for tensor in _tensors((args, kwargs)))))
        if _tensors(out):  # others ask a tensor for its device or shape
            self.note(func, args, kwargs, out)
        self.calls += 1
        return out

    def _parts(self, func: Any, args: Any, kwargs: Any, out: Any) -> list[tuple[Part, Charge]]:
        """What the call did, charged to nobody yet. Calls that only look at memory in another way did nothing."""
        parts = parts_of(func, args, kwargs, out)
        if not parts and not func._schema.is_mutable and _memory_of(out) & _memory_of((args, kwargs)):
            return []
        parts = parts or [Part(0.0)]
        total = sum(part.flops for part in parts)
        return [
            (part, Charge(0, part.flops, self.calls, part.flops / total if total else 1.0 / len(parts)))
            for part in parts
        ]

    # ---- forward

    def _note_forward(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = _tensors(out)
        for part, charge in self._parts(func, args, kwargs, out):
            if not part.of_gradients:
                self.trace.forward_flops += part.flops
                continue
            for index in part.outputs or ():
                self.made.setdefault(_memory(tensors[index]), []).append(charge)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        # the first operator behind a node's number is the node's own
        self.regions.setdefault(torch._C._autograd._get_sequence_nr() - 1, None if hooks is None else hooks[0])

    def end_forward(self) -> None:
        self.note = self._note_backward

    # ---- backward

    def run_backward(self, loss: Tensor, graph: _Graph) -> None:
        for node in graph.nodes:
            node.region = self.regions.get(node.function._sequence_nr())
            node.function.register_prehook(self._enter(node))
            node.function.register_hook(self._leave(node))
        regions: dict[Any, int] = {}
        for node in graph.nodes:
            if node.region is not None and _saves(node.function):
                regions[node.region] = regions.get(node.region, 0) | node.tensors
        gradients = torch.autograd.grad(loss, [leaf for leaf, _bit in graph.leaves], allow_unused=True)
        for gradient, (_leaf, bit) in zip(gradients, graph.leaves, strict=True):
            self._charge_sums([gradient], bit)
        self.trace.charges += [
            Charge(regions[region], charge.flops, charge.call, charge.share) for region, charge in self.again
        ]

    def _enter(self, node: _Node) -> Callable[[Any], None]:
        def enter(gradients: Sequence[Tensor | None]) -> None:
            self._charge_sums(gradients, node.tensors)
            self.window = _Window(node, self.made)

        return enter

    def _leave(self, node: _Node) -> Callable[[Any, Any], None]:
        def leave(gradients: Sequence[Tensor | None], _given: Any) -> None:
            assert self.window is not None
            self.trace.charges += self.window.charges(gradients)
            self.window = None
            for edge, leaf in node.leaves:
                if gradients[edge] is not None and leaf not in self.trace.order:
                    self.trace.order.append(leaf)

        return leave

    def _note_backward(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        parts = self._parts(func, args, kwargs, out)
        if self.window is None:
            self._note_sum([charge for _part, charge in parts], args, out)
        elif torch.is_grad_enabled():
            self.again += [(self.window.node.region, charge) for _part, charge in parts]
        else:
            self.window.note(func, parts, (args, kwargs), out)

    def _note_sum(self, charges: list[Charge], args: Any, out: Any) -> None:
        """Between two nodes autograd adds up gradients that have come from several sides."""
        for key in _memory_of(args):
            charges = charges + self.sums.pop(key, [])
        for tensor in _tensors(out):
            self.sums[_memory(tensor)] = charges

    def _charge_sums(self, gradients: Sequence[Tensor | None], tensors: int) -> None:
        for gradient in gradients:
            if gradient is not None:
                for charge in self.sums.pop(_memory(gradient), []):
                    self.trace.charges.append(Charge(tensors, charge.flops, charge.call, charge.share))


class _Window:
    """What happens inside of one node: which operators feed which.

    Args:
        node: whose backward pass runs.
        made: charges of what has been made for it before, by memory; what is read is taken out.
    """

    def __init__(self, node: _Node, made: dict[int, list[Charge]]) -> None:
        self.node = node
        self.made = made
        self.parts: list[Charge] = []
        self.sources: dict[int, int] = {}  # bit set of `parts` that made what lies in a memory

    def note(self, func: Any, parts: list[tuple[Part, Charge]], given: Any, out: Any) -> None:
        read = _memory_of(given)
        self._take(read)
        before = _union(self.sources.get(key, 0) for key in read)
        first = len(self.parts)
        self.parts += [charge for _part, charge in parts]
        for index, tensor in enumerate(_tensors(out)):
            mine = _union(
                1 << (first + position)
                for position, (part, _charge) in enumerate(parts)
                if part.outputs is None or index in part.outputs
            )
            key = _memory(tensor)
            # where nothing was read from it, memory is new, though something that is gone may have lain there
            self.sources[key] = before | mine | (self.sources.get(key, 0) if key in read else 0)
        if func._schema.is_mutable:
            everything = before | _union(1 << (first + position) for position in range(len(parts)))
            for tensor in _written(func, given):
                self.sources[_memory(tensor)] = everything

    def _take(self, read: Iterable[int]) -> None:
        for key in read:
            for charge in self.made.pop(key, []):
                self.sources[key] = self.sources.get(key, 0) | 1 << len(self.parts)
                self.parts.append(charge)

    def charges(self, gradients: Sequence[Tensor | None]) -> list[Charge]:
        """Each part of the work, charged to the tensors below the edges whose gradients it went into."""
        self._take(_memory_of(gradients))
        owners = [0] * len(self.parts)
        for edge, gradient in zip(self.node.edges, gradients, strict=True):
            sources = 0 if gradient is None else self.sources.get(_memory(gradient), 0)
            for index in range(len(owners)):
                if sources >> index & 1:
                    owners[index] |= edge
        return [
            Charge(owner or self.node.tensors, charge.flops, charge.call, charge.share)
            for owner, charge in zip(owners, self.parts, strict=True)
        ]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """The same for views of one memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _memory_of(tree: Any) -> set[int]:
    return {_memory(tensor) for tensor in _tensors(tree)}


def _written(func: Any, given: tuple[Any, Any]) -> list[Tensor]:
    """The tensors that the operator changes in place."""
    args, kwargs = given
    arguments = func._schema.arguments
    named = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([named.get(name) for name in changed])
