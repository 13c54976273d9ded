"""Runs a step of a model on tensors without memory and notes every kernel that a GPU would be sent.

PyTorch's operators are seen on their way to the device (:mod:`operators` says what each costs), and the Triton kernels
of this package report themselves where they are launched: the code that runs is the code that a GPU would run. An
operator with more than one kernel behind it is replaced by the calls that its package makes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.backends.triton import launch
from peftkern.bench.traffic.operators import Cost, cost
from peftkern.bench.traffic.scopes import Scopes, running_node
from peftkern.ops.lora_linear import counting_eager_calls

_NAMESPACE = "peftkern"
_ON_GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_KEPT_WHOLE = frozenset({"aten::silu_backward"})
"""Operators that a GPU has one kernel for, and that PyTorch would take apart for a device that has none."""


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the operator, as ``aten::mm``, or of the Triton kernel.
        module: dotted name of the module whose forward or backward pass it belongs to.
        backward: whether it belongs to the backward pass.
        shape: of what it makes; of a Triton kernel it is not known.
        bytes_read, bytes_written, flops: each byte once.
    """

    name: str
    module: str
    backward: bool
    shape: tuple[int, ...]
    bytes_read: int
    bytes_written: int
    flops: int

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Saved:
    """Memory that a module keeps for the backward pass.

    Attributes:
        module: that keeps it.
        maker: the innermost module that has returned it.
        storage: the same for all that keep the same memory.
        bytes: of that memory.
    """

    module: str
    maker: str
    storage: int
    bytes: int


@dataclass
class Step:
    """What a step launched, and what it kept between the two passes."""

    kernels: list[Kernel] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)


@contextmanager
def counting(model: nn.Module, replaced: Mapping[str, Callable[..., Any]]) -> Iterator[Step]:
    """Note what runs inside: calls of ``model`` on the ``meta`` device, and the backward pass.

    Args:
        model: names the modules. What it holds is no memory kept for the backward pass.
        replaced: by an operator's name, the function that calls the operators behind it.
    """
    step, scopes = Step(), Scopes(model)
    keep, mode = _Keeper(model, step, scopes), _Mode(step, scopes, replaced)
    with ExitStack() as stack:
        stack.enter_context(scopes.following())
        stack.enter_context(counting_eager_calls())
        stack.enter_context(launch.observing(mode.note_launch))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        stack.enter_context(mode)
        yield step


class _Keeper:
    """Notes what autograd saves, but for what the model holds anyway."""

    def __init__(self, model: nn.Module, step: Step, scopes: Scopes) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._step = step
        self._scopes = scopes
        self._alive: list[torch.UntypedStorage] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in self._held:
            self._alive.append(storage)  # or its number could be given to another one
            module, maker = self._scopes.current(), self._scopes.maker(tensor)
            self._step.saved.append(Saved(module, maker, storage._cdata, storage.nbytes()))
        return tensor


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, step: Step, scopes: Scopes, replaced: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step
        self._scopes = scopes
        self._replaced = replaced

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        with self:
            parts = self._run_parts(function, name, args, kwargs)
        if parts is not NotImplemented:
            return parts
        out = function(*args, **kwargs)
        costs = cost(function, args, kwargs, out)
        if costs is not None:
            self._note(name, tuple(out.shape) if isinstance(out, Tensor) else (), costs)
        return out

    def _run_parts(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run an operator that stands for several, seeing those; ``NotImplemented`` for one that stands for itself."""
        if name in self._replaced:
            return self._replaced[name](*args, **kwargs)
        if function.namespace == _NAMESPACE:
            # what a GPU runs, where the meta device would only be asked for the shape of the result
            return function.redispatch(_ON_GPU, *args, **kwargs)
        return NotImplemented if name in _KEPT_WHOLE else function.decompose(*args, **kwargs)

    def note_launch(self, launched: launch.Launch) -> None:
        """Note a Triton kernel."""
        self._note(launched.kernel, (), Cost(launched.bytes_read, launched.bytes_written, launched.flops))

    def _note(self, name: str, shape: tuple[int, ...], costs: Cost) -> None:
        backward = running_node() is not None
        sizes = (costs.bytes_read, costs.bytes_written, costs.flops)
        self._step.kernels.append(Kernel(name, self._scopes.current(), backward, shape, *sizes))
