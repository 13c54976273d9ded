"""Runs a step of a model on tensors without memory and notes every kernel that a GPU would be sent.

PyTorch's operators are seen on their way to the device (:mod:`operators` says what each costs), and the Triton kernels
of this package are recorded where they are launched. An operator of a package that has more than one kernel behind it
is replaced by the code that the package runs on a GPU, so that its parts are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.backends.triton import launch
from peftkern.bench.traffic.operators import Cost, cost
from peftkern.bench.traffic.scopes import Scopes, running_node

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
        operator: this package's operator that launched it, or empty.
        backward: whether it belongs to the backward pass.
        shape: of what it makes; of a Triton kernel it is not known.
        bytes_read, bytes_written, flops: each byte once.
    """

    name: str
    module: str
    operator: str
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
    """Memory that a module keeps for the backward pass. Modules that keep the same memory have the same ``storage``."""

    module: str
    storage: int
    bytes: int


@dataclass
class Step:
    """What a step launched, and what it kept between the two passes."""

    kernels: list[Kernel] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)


class UnseenLaunchError(RuntimeError):
    """Triton kernels were launched outside of every operator, where no module can be named for them."""


@contextmanager
def counting(model: nn.Module, replaced: Mapping[str, Callable[..., Any]]) -> Iterator[Step]:
    """Note what runs inside: calls of ``model`` on the ``meta`` device, and the backward pass.

    Args:
        model: names the modules. What it holds is no memory kept for the backward pass.
        replaced: by an operator's name, the function that calls the operators behind it.

    Raises:
        UnseenLaunchError: a Triton kernel was launched in a way that cannot be counted.
    """
    step, scopes = Step(), Scopes(model)
    keep = _Keeper(model, step, scopes)
    with launch.recording() as launches, scopes.following():
        mode = _Mode(step, scopes, replaced, launches)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mode:
            yield step
    _check_all_seen(launches)


def _check_all_seen(launches: Sequence[launch.Launch]) -> None:
    if launches:
        names = ", ".join(recorded.kernel for recorded in launches)
        raise UnseenLaunchError(f"launched outside of the operators of this package: {names}")


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
            self._step.saved.append(Saved(self._scopes.current(), storage._cdata, storage.nbytes()))
        return tensor


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes launches. ``launches`` is what is being recorded, and is emptied as its entries are noted.

    An entry holds on to the tensors of its launch, and autograd copies a gradient that somebody else holds.
    """

    def __init__(
        self, step: Step, scopes: Scopes, replaced: Mapping[str, Callable[..., Any]], launches: list[launch.Launch]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step
        self._scopes = scopes
        self._replaced = replaced
        self._launches = launches
        self._operator = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name in self._replaced:
            with self:
                return self._replaced[name](*args, **kwargs)
        if function.namespace == _NAMESPACE:
            return self._run_ours(function, args, kwargs)
        if name not in _KEPT_WHOLE:
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = function(*args, **kwargs)
        self._note_operator(name, cost(function, args, kwargs, out), out)
        return out

    def _run_ours(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run what the operator runs on a GPU, where ``meta`` would only be asked for the shape of the result."""
        outermost = not self._operator
        if outermost:
            _check_all_seen(self._launches)
            self._operator = function._schema.name
        try:
            with self:
                out = function.redispatch(_ON_GPU, *args, **kwargs)
            self._note_launches()
        finally:
            self._operator = "" if outermost else self._operator
        return out

    def _note_operator(self, name: str, costs: Cost | None, out: Any) -> None:
        if costs is None:
            return
        if self._operator:
            self._note_launches()
        self._note(name, tuple(out.shape) if isinstance(out, Tensor) else (), costs)

    def _note_launches(self) -> None:
        for recorded in self._launches:
            self._note(recorded.kernel, (), Cost(recorded.bytes_read, recorded.bytes_written, recorded.flops))
        self._launches.clear()

    def _note(self, name: str, shape: tuple[int, ...], costs: Cost) -> None:
        backward = running_node() is not None
        module = self._scopes.current()
        sizes = (costs.bytes_read, costs.bytes_written, costs.flops)
        self._step.kernels.append(Kernel(name, module, self._operator, backward, shape, *sizes))
