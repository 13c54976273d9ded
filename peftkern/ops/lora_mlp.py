"""A gated feed-forward block of frozen linear layers with adapters, as one operation that keeps next to nothing.

    g = gate(x)        u = up(x)        m = a(g) ⊙ u        y = down(m)

gate, up and down are what :mod:`peftkern.ops.sparse_delta_linear` says, a is an activation of
:mod:`peftkern.ops.silu_mul`. What is kept for the backward pass is x, and of g and u, which are several times as wide,
what ``recompute`` leaves:

    "mlp"   neither: both are made again in the backward pass
    "up"    g: u is made again
    None    both

m is never kept. What is made again has the bits of the forward pass, its dropout masks included, and its memory takes
the gradients of g and u; beside them the backward pass holds one more matrix of their size. With ``"mlp"`` nothing of
that size outlives either pass.

Source: Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016 (arXiv:1604.06174), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkern.backends import registry
from peftkern.ops import dropout
from peftkern.ops.gated_lora_linear import gated_backward
from peftkern.ops.lora_linear import (
    as_matrix,
    bias_gradient,
    check_versions,
    flatten_weight,
    in_autocast_dtype,
    inner_products,
    is_plain_eager,
    weight_tensors,
    weight_versions,
)
from peftkern.ops.lora_linear_group import Member, backend_for, check_member
from peftkern.ops.silu_mul import check_activation
from peftkern.ops.sparse_delta_linear import (
    Deltas,
    add_by_operator,
    backward_deltas,
    check_index_versions,
    checked_deltas,
    index_versions,
)

RECOMPUTE = ("mlp", "up")
"""What may be made again in the backward pass."""


def lora_mlp(
    x: Tensor,
    gate: Member,
    up: Member,
    down: Member,
    *,
    deltas: Sequence[Deltas] = (),
    activation: str = "silu",
    recompute: str | None = "mlp",
    backend: str | None = None,
) -> Tensor:
    """``y = down(activation(gate(x)) * up(x))``.

    The result has the same bits whatever is recomputed. Differentiable, once, in x and in the adapters, values and
    biases of the three layers; only what asks for a gradient gets one. Seeds are drawn in the order gate, up, down.
    Where something watches operators, `torch.compile` among them, it is the operators of its parts under PyTorch's
    gradient checkpointing.

    Args:
        x: [..., in], float64, float32, bfloat16 or float16; any strides, any number of tokens, 0 included.
        gate, up: layers from [in] to [inner]; a seed in their adapters is not used.
        down: the layer from [inner] to [out].
        deltas: sparse deltas of gate, up and down, in this order; empty: none in any.
        activation: as for `silu_mul`.
        recompute: ``"mlp"``, ``"up"`` or ``None``, as above.
        backend: name of the backend that must run every part; ``None`` lets the table decide.

    Returns:
        [..., out] in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: shapes or devices do not fit, ``recompute`` or ``activation`` is unknown, ``deltas`` are not three;
            and where `lora_linear` and `sparse_delta_linear` raise it.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: in the backward pass, if a weight or an index set was modified in place after the forward pass.
        BackendError: a forced backend cannot run a part.
    """
    block = _checked(x, (gate, up, down), deltas, activation, recompute)
    x = in_autocast_dtype(x)
    block = replace(block, layers=[_with_seed(layer) for layer in block.layers], backend=backend)
    tensors = [tensor for layer in block.layers for tensor in layer.tensors()]
    biases = [layer.member.bias for layer in block.layers]
    if not is_plain_eager((x, *tensors, *(bias for bias in biases if bias is not None))):
        return _by_operators(x, block)
    block = replace(block, together=_may_group(x, block))
    return _apply(x, block, *biases, *(factor for layer in block.layers for factor in layer.trained()))


@dataclass(frozen=True)
class _Layer:
    """One of the three layers."""

    member: Member
    deltas: Deltas

    def tensors(self) -> list[Tensor]:
        """All but the bias."""
        adapters = self.member.adapters
        return [*weight_tensors(self.member.weight), *self.deltas.tensors(), *adapters.lora_A, *adapters.lora_B]

    def trained(self) -> list[Tensor]:
        """What may ask for a gradient beside the bias: values, every A, every B."""
        adapters = self.member.adapters
        return [*self.deltas.values, *adapters.lora_A, *adapters.lora_B]

    def bare(self) -> _Layer:
        """Without what autograd keeps."""
        adapters = replace(self.member.adapters, lora_A=(), lora_B=(), seed=None)
        return _Layer(Member(self.member.weight, adapters, None), replace(self.deltas, values=[]))

    def filled(self, seed: Tensor | None, bias: Tensor | None, trained: Iterator[Tensor]) -> _Layer:
        """The way back from :meth:`bare`."""
        values = list(islice(trained, len(self.deltas.indices)))
        count = len(self.member.adapters.scaling)
        lora_A, lora_B = list(islice(trained, count)), list(islice(trained, count))
        adapters = replace(self.member.adapters, lora_A=lora_A, lora_B=lora_B, seed=seed)
        return _Layer(Member(self.member.weight, adapters, bias), replace(self.deltas, values=values))


@dataclass(frozen=True)
class _Block:
    """A call but for x. ``together``: gate and up run as a group."""

    layers: list[_Layer]
    activation: str
    recompute: str | None
    backend: str | None = None
    together: bool = False

    def bare(self) -> _Block:
        """Without what autograd keeps."""
        return replace(self, layers=[layer.bare() for layer in self.layers])

    def filled(self, seeds: Sequence[Tensor | None], tensors: Sequence[Any]) -> _Block:
        """The way back from :meth:`bare`; ``tensors`` are the biases, then what each layer trains beside them."""
        biases, trained = tensors[: len(seeds)], iter(tensors[len(seeds) :])
        parts = zip(self.layers, seeds, biases, strict=True)
        layers = [layer.filled(seed, bias, trained) for layer, seed, bias in parts]
        return replace(self, layers=layers)

    def versions(self) -> list[tuple[Any, Any]]:
        """Counts the in-place changes of what `bare` leaves."""
        return [(weight_versions(layer.member.weight), index_versions(layer.deltas.indices)) for layer in self.layers]

    def check_versions(self, versions: Sequence[tuple[Any, Any]]) -> None:
        """Raise where they are others now."""
        for layer, (of_weight, of_indices) in zip(self.layers, versions, strict=True):
            check_versions(layer.member.weight, of_weight)
            check_index_versions(layer.deltas.indices, of_indices)


def _with_seed(layer: _Layer) -> _Layer:
    adapters = layer.member.adapters
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    return replace(layer, member=replace(layer.member, adapters=replace(adapters, seed=seed)))


def _may_group(x: Tensor, block: _Block) -> bool:
    gate, up, _down = block.layers
    # one of a group cannot be made again with the bits that the group gave it
    if block.recompute == "up" or gate.deltas.values or up.deltas.values:
        return False
    return backend_for(x, [gate.member, up.member], block.backend) is not None


# ---- checks


def _checked(x: Any, members: Sequence[Any], deltas: Any, activation: Any, recompute: Any) -> _Block:
    check_activation("lora_mlp", activation)
    if recompute is not None and recompute not in RECOMPUTE:
        raise ValueError(f"lora_mlp: recompute must be one of {', '.join(RECOMPUTE)} or None, got {recompute!r}")
    if len(deltas) not in (0, 3):
        raise ValueError(f"lora_mlp: deltas must hold those of gate, up and down, or nothing; got {len(deltas)}")
    gate, up = (check_member("lora_mlp", x, member) for member in members[:2])
    if gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"lora_mlp: gate and up must be of one shape, got {list(gate.weight.shape)} and {list(up.weight.shape)}"
        )
    down, inner = members[2], gate.weight.shape[0]
    if isinstance(down, Member) and down.weight.shape[-1] != inner:
        raise ValueError(
            f"lora_mlp: down must be [out, inner] with inner = {inner} as in gate, got {list(down.weight.shape)}"
        )
    down = check_member("lora_mlp", x.new_empty(0, inner), down)
    members = (gate, up, down)
    given = deltas or [Deltas([], [], [])] * 3
    layers = [
        _Layer(member, checked_deltas("lora_mlp", d.values, d.indices, d.scaling, member.weight.shape, x.device))
        for member, d in zip(members, given, strict=True)
    ]
    return _Block(layers, activation, recompute)


# ---- eager calls


@dataclass(frozen=True)
class _LayerNeeds:
    """Which gradients of a layer are asked for."""

    bias: bool
    values: Sequence[bool]
    lora_A: Sequence[bool]
    lora_B: Sequence[bool]

    def any(self) -> bool:
        """Whether its output needs one."""
        return self.bias or self.reads_input() or any(self.lora_B)

    def reads_input(self) -> bool:
        """Whether one of them is made of its input."""
        return any(self.values) or any(self.lora_A)

    def lora(self) -> list[bool]:
        """Of every A, then of every B."""
        return [*self.lora_A, *self.lora_B]


@dataclass(frozen=True)
class _Needs:
    """Which gradients of a call are asked for, and what they are made of: of gate and up, by position."""

    x: bool
    layers: Sequence[_LayerNeeds]
    again: tuple[bool, bool]
    """What is made again."""
    kept: tuple[bool, bool]
    """What is kept instead."""

    @staticmethod
    def of(ctx: Any, block: _Block) -> _Needs:
        need_x, _block, *flags = ctx.needs_input_grad
        biases, rest = flags[:3], iter(flags[3:])
        layers = [_layer_needs(layer, bias, rest) for layer, bias in zip(block.layers, biases, strict=True)]
        gate, up, down = layers
        up_is_read = need_x or gate.any() or down.reads_input()
        read = (up_is_read or up.any(), up_is_read)
        again = (read[0] and block.recompute == "mlp", read[1] and block.recompute is not None)
        return _Needs(need_x, layers, again, (read[0] and not again[0], read[1] and not again[1]))

    def halves(self) -> tuple[bool, bool]:
        """Whether gate and up, the outputs, need a gradient."""
        gate, up, _down = self.layers
        return self.x or gate.any(), self.x or up.any()

    def reads_x(self) -> bool:
        return any(self.again) or any(layer.reads_input() for layer in self.layers[:2])


def _layer_needs(layer: _Layer, bias: bool, flags: Iterator[bool]) -> _LayerNeeds:
    adapters = len(layer.member.adapters.scaling)
    counts = (len(layer.deltas.indices), adapters, adapters)
    return _LayerNeeds(bias, *([next(flags) for _ in range(count)] for count in counts))


class _LoraMlp(torch.autograd.Function):
    """``tensors`` are the biases of the three layers (``None`` where there is none), then what each of them trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Block, *tensors: Tensor | None) -> Tensor:
        (gate, up), h = _run_halves(as_matrix(x), block, (True, True))
        assert gate is not None and up is not None
        needs = _Needs.of(ctx, block)
        kept = [half if keep else None for half, keep in zip((gate, up), needs.kept, strict=True)]
        kept_h = [None if again else part for part, again in zip(h, _h_again(block, needs), strict=True)]
        # over a half that is not kept, and that nobody else sees
        memory = gate if kept[0] is None else up if kept[1] is None else None
        middle = registry.run("silu_mul", gate, up, block.activation, memory, backend=block.backend)
        del gate, up
        y, h_down = _product(middle, block.layers[2], block.backend)
        # not among the saved tensors, whose hooks would copy or offload what stays where it is anyway
        ctx.block, ctx.shape, ctx.versions = block.bare(), x.shape, block.versions()
        ctx.save_for_backward(
            x if needs.reads_x() else None,
            *kept,
            *kept_h,
            h_down if any(needs.layers[2].lora_B) else None,
            *(layer.member.adapters.seed for layer in block.layers),
            *tensors,
        )
        # not a view in autograd's eyes: the output of an operator may be modified in place
        return cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, h_gate, h_up, h_down, *tensors = ctx.saved_tensors
        bare: _Block = ctx.block
        bare.check_versions(ctx.versions)
        block, needs = bare.filled(tensors[:3], tensors[3:]), _Needs.of(ctx, bare)
        grad, x = as_matrix(grad.resolve_neg()), None if x is None else as_matrix(x)
        h = [h_gate, h_up]
        if any(needs.again):
            assert x is not None
            (made_gate, made_up), made_h = _run_halves(x, block, needs.again)
            gate, up = made_gate if gate is None else gate, made_up if up is None else up
            h = [made if kept is None else kept for made, kept in zip(made_h, h, strict=True)]
        grads, of_down = _backward_of_down(grad, gate, up, block, h_down, needs)
        del gate, up
        grad_x, of_halves = _backward_of_halves(grads, x, block, h, needs)
        biases = [
            bias_gradient(part) if layer.bias and part is not None else None
            for part, layer in zip((*grads, grad), needs.layers, strict=True)
        ]
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, *biases, *of_halves, *of_down


_apply = cast(Callable[..., Tensor], _LoraMlp.apply)


def _product(x: Tensor, layer: _Layer, backend: str | None) -> tuple[Tensor, Tensor]:
    """What the layer makes of the matrix x, and its h."""
    member = layer.member
    y, h = registry.run("lora_linear", x, member.weight, member.adapters, member.bias, backend=backend)
    for delta in layer.deltas:
        registry.run("sparse_delta", y, x, *delta, backend=backend)
    return y, h


Pair = list[Tensor | None]
"""Of gate and up."""


def _run_halves(x: Tensor, block: _Block, wanted: Sequence[bool]) -> tuple[Pair, Pair]:
    """gate and up of the matrix x as far as they are wanted, and their h; the first is that of both where they are one
    group, which is made as a whole."""
    gate, up, _down = block.layers
    if block.together:
        members = [gate.member, up.member]
        outputs, h = registry.run("lora_linear_group", x, members, backend=block.backend)
        return outputs, [h, None]
    results: list[tuple[Tensor | None, Tensor | None]] = [
        _product(x, layer, block.backend) if want else (None, None)
        for layer, want in zip((gate, up), wanted, strict=True)
    ]
    return [y for y, _h in results], [h for _y, h in results]


def _h_again(block: _Block, needs: _Needs) -> tuple[bool, bool]:
    """Which h of gate and up need not be kept: those made again, and those that nothing reads."""
    gate, up = (any(layer.lora_B) for layer in needs.layers[:2])
    if block.together:
        return any(needs.again) or not (gate or up), True
    return needs.again[0] or not gate, needs.again[1] or not up


def _backward_of_down(
    grad: Tensor, gate: Tensor | None, up: Tensor | None, block: _Block, h: Tensor | None, needs: _Needs
) -> tuple[Pair, list[Tensor | None]]:
    """The gradients of gate and up, and those of what down trains. A half that was made again is written over."""
    layer, needs_down = block.layers[2], needs.layers[2]
    adapters, need_lora = layer.member.adapters, needs_down.lora()
    h = inner_products(h, grad, adapters)
    if gate is not None:
        call = (grad, gate, up, layer.member.weight, adapters, h, *needs.halves(), need_lora, block.activation)
        options = (layer.deltas, needs_down.values, block.backend, needs.again)
        grad_gate, grad_up, grad_A, grad_B, grad_values = gated_backward(*call, *options)
        return [grad_gate, grad_up], [*grad_values, *grad_A, *grad_B]
    grad_values = [None] * len(needs_down.values)
    if not any(need_lora):
        return [None, None], [*grad_values, *[None] * len(need_lora)]
    _grad_middle, grad_A, grad_B = registry.run(
        "lora_linear_backward", grad, None, layer.member.weight, adapters, h, False, need_lora, backend=block.backend
    )
    return [None, None], [*grad_values, *grad_A, *grad_B]


def _backward_of_halves(
    grads: Pair, x: Tensor | None, block: _Block, h: Pair, needs: _Needs
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x, and those of what gate and up train."""
    if block.together and any(grad is not None for grad in grads):
        return _backward_of_group(grads, x, block, h[0], needs)
    grad_x: Tensor | None = None
    gradients: list[Tensor | None] = []
    for grad, layer, part_h, layer_needs in zip(grads, block.layers[:2], h, needs.layers[:2], strict=True):
        part, of_layer = _backward_of_half(grad, x, layer, part_h, needs.x, layer_needs, block.backend)
        gradients += of_layer
        grad_x = part if grad_x is None or part is None else grad_x.add_(part)
    return grad_x, gradients


def _backward_of_group(
    grads: Pair, x: Tensor | None, block: _Block, h: Tensor | None, needs: _Needs
) -> tuple[Tensor | None, list[Tensor | None]]:
    members, need_lora = [layer.member for layer in block.layers[:2]], [layer.lora() for layer in needs.layers[:2]]
    if not needs.x and not any(map(any, need_lora)):
        return None, [None] * sum(map(len, need_lora))
    if h is None:  # no B is trained, and nothing reads it
        known = next(grad for grad in grads if grad is not None)
        h = torch.cat([inner_products(None, known, member.adapters) for member in members], dim=1)
    call = (grads, x, members, h, needs.x, need_lora)
    grad_x, grad_A, grad_B = registry.run("lora_linear_group_backward", *call, backend=block.backend)
    return grad_x, [gradient for both in zip(grad_A, grad_B, strict=True) for part in both for gradient in part]


def _backward_of_half(
    grad: Tensor | None,
    x: Tensor | None,
    layer: _Layer,
    h: Tensor | None,
    need_x: bool,
    needs: _LayerNeeds,
    backend: str | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    adapters, need_lora = layer.member.adapters, needs.lora()
    grad_x, grad_A, grad_B = None, [None] * len(adapters), [None] * len(adapters)
    if grad is None:
        return None, [*[None] * len(needs.values), *grad_A, *grad_B]
    if need_x or any(need_lora):
        call = (grad, x, layer.member.weight, adapters, inner_products(h, grad, adapters), need_x, need_lora)
        grad_x, grad_A, grad_B = registry.run("lora_linear_backward", *call, backend=backend)
    grad_values = backward_deltas(grad, x, grad_x, layer.deltas, needs.values, backend)
    return grad_x, [*grad_values, *grad_A, *grad_B]


# ---- operators


def _by_operators(x: Tensor, block: _Block) -> Tensor:
    gate, up, down = block.layers

    def rest(x: Tensor, given: Tensor | None) -> Tensor:
        half = _by_operator(x, gate, block.backend) if given is None else given
        other = _by_operator(x, up, block.backend)
        middle = torch.ops.peftkern.silu_mul(half, other, block.activation, block.backend)
        return _by_operator(middle, down, block.backend)

    if block.recompute is None or not torch.is_grad_enabled():
        return rest(x, None)
    given = _by_operator(x, gate, block.backend) if block.recompute == "up" else None
    # no random numbers are drawn inside
    y: Tensor = checkpoint(rest, x, given, use_reentrant=False, preserve_rng_state=False)
    return y


def _by_operator(x: Tensor, layer: _Layer, backend: str | None) -> Tensor:
    member, adapters = layer.member, layer.member.adapters
    lists = (adapters.lora_A, adapters.lora_B, adapters.scaling, adapters.dropout_p, adapters.seed)
    y: Tensor
    y, _ = torch.ops.peftkern.lora_linear(x, *flatten_weight(member.weight), *lists, member.bias, backend)
    return add_by_operator(y, x, layer.deltas, backend)
