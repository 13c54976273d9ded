"""What a step computes and moves, operator by operator, and how long a device takes for it.

    seconds = Σ over operators of max(FLOPs / rate, bytes / bandwidth, launch)

FLOPs are those of `peftkern.select.flops`. Bytes are those of the tensors that go in and come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkern.ops.lora_mlp import RECOMPUTE
from peftkern.patch.fused import STATE
from peftkern.plan.devices import Rates
from peftkern.plan.memory import loss_of
from peftkern.plan.model import Subject
from peftkern.plan.stand_ins import run_operator
from peftkern.select.flops import parts_of

_FORWARD = (torch.ops.peftkern.lora_linear.default, torch.ops.peftkern.sparse_delta.default)

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linear", "convolution", "convolution_backward"})


@dataclass(frozen=True)
class Work:
    """Of a step: forward and backward pass, without the optimizer.

    Attributes:
        forward_flops, backward_flops: a multiply-add counts 2.
        bytes: read and written by operators.
        seconds: as the device's rates say.
        operators: how many ran.
    """

    forward_flops: float
    backward_flops: float
    bytes: float
    seconds: float
    operators: float

    @property
    def flops(self) -> float:
        """Of both passes."""
        return self.forward_flops + self.backward_flops

    def extrapolated(self, shallow: Work, more: int) -> Work:
        """Of a model with ``more`` layers more than this one's, which has one more than ``shallow``'s."""
        names = self.__dataclass_fields__
        return Work(**{name: (1 + more) * getattr(self, name) - more * getattr(shallow, name) for name in names})

    def plus(self, more: Work, less: Work, factor: float) -> Work:
        """``self + factor * (more - less)``."""
        names = self.__dataclass_fields__
        return Work(
            **{name: getattr(self, name) + factor * (getattr(more, name) - getattr(less, name)) for name in names}
        )


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = rates
        self.not_again: set[int] = set()
        """Storages that no operator of the forward pass reads from now on in training, whatever reads them here."""
        self.flops = self.bytes = self.seconds = 0.0
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = run_operator(func, args, kwargs)
        read, written = _tensors((args, kwargs)), _tensors(out)
        if not written or (func in _FORWARD and self.not_again & _memory(read)):
            return out
        flops = sum(part.flops for part in parts_of(func, args, kwargs, out))
        if not flops and not func._schema.is_mutable and _memory(written) & _memory(read):
            return out  # looks at memory in another way
        moved = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in (*read, *written)}.values())
        self.flops += flops
        self.bytes += moved
        self.operators += 1
        self.seconds += max(flops / self._rate(func, args), moved / self.rates.bandwidth, self.rates.launch)
        return out

    def _rate(self, func: Any, args: Any) -> float:
        space, _, name = func.name().split(".")[0].partition("::")
        dtype = next((_name(t.dtype) for t in _tensors(args) if t.is_floating_point()), "float32")
        if space == "peftkern" and "linear" in name:
            by_dtype = self.rates.products if "dense" in args or name == "linear_cross_entropy" else self.rates.packed
        elif name in _PRODUCTS:
            by_dtype = self.rates.products
        else:
            return self.rates.attention if "attention" in name else self.rates.pointwise
        return by_dtype.get(dtype, by_dtype["float32"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensors: list[Tensor]) -> set[int]:
    return {int(tensor.untyped_storage()._cdata) for tensor in tensors}


def _behind_recomputed_gates(model: Any) -> set[int]:
    """Storages of the layers behind gates of blocks that make gate and up again.

    In training such a block is one autograd function that does without its last product in the backward pass. As
    operators, which are what is counted here, it is under PyTorch's checkpointing, which repeats that one too.
    """
    modules = list(model.modules())
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):  # repeats it with the layer
        return set()
    blocks = filter(_makes_again, modules)
    return {int(tensor.untyped_storage()._cdata) for block in blocks for tensor in _tensors_of(block.down_proj)}


def _makes_again(module: Any) -> bool:
    state = module.__dict__.get(STATE)
    return state is not None and state.recompute in RECOMPUTE and hasattr(module, "down_proj")


def _tensors_of(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def count_work(subject: Subject, batch: Mapping[str, Tensor], rates: Rates) -> Work:
    """The work of forward and backward pass on ``batch``."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        count = stack.enter_context(_Count(rates))
        loss = loss_of(subject.model, batch)
        forward = count.flops
        count.not_again = _behind_recomputed_gates(subject.model)
        loss.backward()  # type: ignore[no-untyped-call]
    for parameter in subject.model.parameters():
        parameter.grad = None
    return Work(forward, count.flops - forward, count.bytes, count.seconds, count.operators)
