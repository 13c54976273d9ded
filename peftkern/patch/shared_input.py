"""Layers that a block calls with one and the same tensor, run as one group.

An attention block of transformers calls `q_proj(x)`, `k_proj(x)` and `v_proj(x)` one after another, a gated block its
`gate_proj(x)` and `up_proj(x)`. The first of them to be called computes the outputs of all; the others hand theirs out
when they are called with the very same tensor and nothing has changed that their result depends on. Any other call
computes its own, so that a result never depends on who shares what. Layers with sparse deltas or a mask run alone, and
`torch.compile` sees every layer alone.

Which layers belong together is known by their names. Where a block turns out not to ask for every output (it skips a
layer, or feeds it another tensor), its group is dissolved.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.ops.lora_linear_group import Member, backend_for, is_elsewhere, run_as_one
from peftkern.patch.arguments import LayerArguments, is_hooked_before, read_layer
from peftkern.patch.fused import STATE, LayerState, is_fused
from peftkern.patch.weights import NotFused

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("linear_q", "linear_k", "linear_v"),  # Conformer
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek
    ("gate_proj", "up_proj"),  # Llama and most others
    ("wi_0", "wi_1"),  # T5
    ("w1", "w3"),  # LFM2
)
"""Names, under one parent, of layers that are called with one tensor."""

_TWO_INPUTS = re.compile(r"cross_?att|encoder_attn|EncDecAttention")
"""Attention blocks of these names take keys and values from another tensor than queries."""

UNUSED = "it shares its input with others in one product, of which not every output was asked for"


def sibling_groups(in_features: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Which of the layers, given by name with their number of inputs, share their input."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in in_features)
    groups = []
    for parent in parents:
        if _TWO_INPUTS.search(parent):
            continue
        for row in SIBLINGS:
            present = [name for name in (f"{parent}.{child}".lstrip(".") for child in row) if name in in_features]
            group = tuple(name for name in present if in_features[name] == in_features[present[0]])
            groups += [group] if len(group) > 1 else []
    return groups


@dataclass
class _Pending:
    """Outputs that wait for their layers to be called.

    Attributes:
        members: positions in the group of all layers that were computed.
        x: what they were computed from.
        context: the state of x and of PyTorch then.
        outputs: by position in the group: the output, the arguments and their state.
        graph: stands for the autograd graph behind them.
    """

    members: frozenset[int]
    x: Tensor
    context: tuple[Any, ...]
    outputs: dict[int, tuple[Tensor, LayerArguments, tuple[Any, ...]]]
    graph: _Graph


class _Graph:
    """Lives as long as the autograd graph of one call."""


class SharedInput:
    """The group that some patched layers form. Each of them holds it; it holds none of them.

    Copying or pickling one of the layers takes the others along: a copy of a model has groups of its own. Outputs that
    wait are never copied.

    Args:
        layers: in the order in which their block calls them, which is that of their dropout masks.
    """

    def __init__(self, layers: Sequence[nn.Module], dissolved: bool = False) -> None:
        self.dissolved = dissolved
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self._pending: _Pending | None = None
        self._wasted = False
        # where groups of such layers have been run, and where not: asking takes a good part of a small layer's time
        self._at_home: torch.device | None = None
        self._elsewhere: torch.device | None = None
        # A group must not be dissolved between a call and its recomputation by gradient checkpointing, which has to
        # save the same tensors and draw the same random numbers. So the calls that may still be recomputed are known:
        # those with a graph by their graph, and those without one, as reentrant checkpointing makes them, by number.
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._to_recompute = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers(), "dissolved": self.dissolved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def layers(self) -> list[nn.Module]:
        """Those that still exist."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def forget(self) -> None:
        """Drop the outputs that wait."""
        self._pending = None

    def output(self, layer: nn.Module, x: Tensor, arguments: LayerArguments) -> Tensor | None:
        """The product of ``layer`` with x, computed with its siblings'; ``None`` where it has to run alone.

        The result is of the dtype that the layer computes in.
        """
        # what keeps no count of its changes cannot be told from what it was
        if self.dissolved or x.device == self._elsewhere or type(x) is not Tensor or x.is_inference():
            return None
        # not found in a copy that shares this object, as nn.DataParallel makes them
        position = next((i for i, reference in enumerate(self._layers) if reference() is layer), None)
        if position is None:
            return None
        if self._pending is not None and position in self._pending.outputs:
            return self._hand_out(self._pending, position, x, arguments)
        if is_hooked_before(layer) or self._left_out(position, x):
            return None
        self._waste_all()
        return self._compute(layer, position, x, arguments)

    def _left_out(self, position: int, x: Tensor) -> bool:
        """Whether the others were computed for x without this layer, because it could not join them."""
        pending = self._pending
        return pending is not None and pending.x is x and position not in pending.members

    def _hand_out(self, pending: _Pending, position: int, x: Tensor, arguments: LayerArguments) -> Tensor | None:
        output, _older_arguments, state = pending.outputs[position]
        if pending.x is x and pending.context == _context(x) and state == arguments.state():
            self._remove(pending, position)
            return output
        self._waste(pending, [position])
        return None

    def _compute(self, layer: nn.Module, position: int, x: Tensor, arguments: LayerArguments) -> Tensor | None:
        if self._wasted and not self._graphs and self._to_recompute == 0:
            self._dissolve()
        x_, backend = arguments.to_compute(x), _state(layer).backend
        if self.dissolved or not self._has_form(x_, arguments, backend):
            return None
        members = {position: arguments, **self._siblings(layer, x, x_)}
        positions = sorted(members)
        outputs = None if len(members) < 2 else run_as_one(x_, group_members([members[i] for i in positions]), backend)
        if outputs is None:
            return None
        by_position = dict(zip(positions, outputs, strict=True))
        own = by_position.pop(position)
        waiting = {i: (output, members[i], members[i].state()) for i, output in by_position.items()}
        graph = self._watch(outputs, layer.training)
        self._pending = _Pending(frozenset(members), x, _context(x), waiting, graph)
        return own

    def _has_form(self, x: Tensor, arguments: LayerArguments, backend: str | None) -> bool:
        """Whether some backend may run a group of layers like this one."""
        if x.device == self._at_home:
            return True
        alone = group_members([arguments])
        if backend_for(x, alone, backend) is not None:
            self._at_home = x.device
            return True
        self._elsewhere = x.device if is_elsewhere(x, alone) else None
        return False

    def _siblings(self, layer: nn.Module, x: Tensor, x_: Tensor) -> dict[int, LayerArguments]:
        """What the other layers would multiply x with, as far as they can join; ``x_`` is x as ``layer`` takes it."""
        found = {}
        for position, reference in enumerate(self._layers):
            sibling = reference()
            if sibling is None or sibling is layer or not self._is_member(sibling):
                continue
            try:
                arguments = read_layer(sibling, x)
            except NotFused:
                continue
            fits = arguments.weight.shape[1] == x.shape[-1] and arguments.compute_dtype(x.dtype) == x_.dtype
            if fits and not arguments.runs_alone():
                found[position] = arguments
        return found

    def _is_member(self, sibling: nn.Module) -> bool:
        return is_fused(sibling) and _state(sibling).shared is self and not is_hooked_before(sibling)

    # ---- outputs that nobody asked for

    def _remove(self, pending: _Pending, position: int) -> None:
        del pending.outputs[position]
        if not pending.outputs and self._pending is pending:
            self._pending = None

    def _waste(self, pending: _Pending, positions: Sequence[int]) -> None:
        self._wasted = True
        for position in positions:
            self._remove(pending, position)
            layer = self._layers[position]()
            if layer is not None and STATE in layer.__dict__:
                _state(layer).unused += 1

    def _waste_all(self) -> None:
        if self._pending is not None:
            self._waste(self._pending, list(self._pending.outputs))

    def _dissolve(self) -> None:
        self.dissolved = True
        for layer in self.layers():
            if STATE in layer.__dict__:
                _state(layer).warn("runs alone from now on", UNUSED)

    # ---- what gradient checkpointing may recompute

    def _watch(self, outputs: Sequence[Tensor], training: bool) -> _Graph:
        graph = _Graph()
        node = next((output.grad_fn for output in outputs if output.grad_fn is not None), None)
        if node is not None:
            self._graphs.add(graph)
            node.register_hook(_on_backward(weakref.ref(self), graph))
        if torch._C._current_graph_task_id() != -1:  # in a backward pass, which recomputes
            self._to_recompute = max(0, self._to_recompute - 1)
        elif training and not torch.is_grad_enabled():
            self._to_recompute += 1
        return graph

    def settle(self, graph: _Graph) -> None:
        """The backward pass has gone through the graph: it is not recomputed any more, nor can it serve anyone else."""
        self._graphs.discard(graph)
        if self._pending is not None and self._pending.graph is graph:
            self._waste_all()


def _on_backward(reference: weakref.ref[SharedInput], graph: _Graph) -> Callable[..., None]:
    def settle(*_gradients: Any) -> None:
        shared = reference()
        if shared is not None:
            shared.settle(graph)

    return settle


def _state(layer: nn.Module) -> LayerState:
    state: LayerState = layer.__dict__[STATE]
    return state


def group_members(layers: Sequence[LayerArguments]) -> list[Member]:
    """The layers as `lora_linear_group` takes them."""
    return [layer.member() for layer in layers]


def _context(x: Tensor) -> tuple[Any, ...]:
    """What a result depends on beside the arguments and the values of x."""
    device = x.device.type
    autocast = None
    if not x.is_meta and torch.is_autocast_enabled(device):  # the meta device has no autocast, and asking for it raises
        autocast = torch.get_autocast_dtype(device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, stream)
    return x._version, x.requires_grad, *modes
