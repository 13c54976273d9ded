"""An update in a model: which of its parameters are written to, and how they get their bits back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftkern.integrations.fingerprint import base_parameters
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.sparse.layers import base_layer, deltas, detach, weight_shape
from peftkern.sparse.merging import merge, unmerge
from peftkern.sparse.update_file import Entries


@dataclass
class Change:
    """Numbers that are written into a parameter: at flat ``positions``, or all of them."""

    name: str
    parameter: nn.Parameter
    positions: Tensor | None
    before: Tensor
    after: Tensor

    def apply(self) -> None:
        """Write them."""
        _write(self.parameter, self.positions, self.after)

    def is_there(self) -> bool:
        """Whether the parameter still holds what was written."""
        return torch.equal(_read(self.parameter, self.positions), self.after)

    def revert(self) -> None:
        """Write back what was there before."""
        _write(self.parameter, self.positions, self.before)


@dataclass
class Applied:
    """An update that acts in a model.

    Attributes:
        model: without PEFT's wrapper.
        name: of the deltas on its linear layers; ``None`` where the update has nothing there.
        changes: what was written into other parameters.
        errors: by layer, what merging added by quantizing again; empty before `merge`.
        reverted: whether it has been taken out again.
    """

    model: nn.Module
    name: str | None
    changes: list[Change]
    errors: dict[str, float] = field(default_factory=dict)
    reverted: bool = False

    def merge(self, requantize: bool = False) -> None:
        """Make the deltas part of the weights; as :func:`peftkern.sparse.merge`."""
        if self.name is not None:
            self.errors = merge(self.model, self.name, requantize=requantize)

    def revert(self) -> None:
        """Take the update out: every parameter has the bits from before, and the deltas are gone.

        Raises:
            ValueError: that was done before, or a parameter has been changed since. Nothing was changed.
        """
        if self.reverted:
            raise ValueError("revert: the update has been taken out before")
        changed = [change.name for change in self.changes if not change.is_there()]
        if changed:
            raise ValueError(
                f"revert: {changed[0]} has been changed since; take out first what was applied later, or train "
                "something else than what an update has written"
            )
        if self.name is not None:
            if any(delta.merged for delta in deltas(self.model, self.name).values()):
                unmerge(self.model, self.name)
            detach(self.model, self.name)
        for change in reversed(self.changes):
            change.revert()
        self.reverted = True


# ---- where an update goes


def check_names(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise `ValueError` where one of ``names`` is not among ``known``."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what} names {unknown[0]!r}, and {len(unknown) - 1} more, of which there are no parameters")


def read_parameters(
    model: nn.Module, entries: Mapping[str, Entries], dense: Mapping[str, Tensor]
) -> tuple[dict[str, Entries], dict[str, Entries]]:
    """Which entries are of linear layers, by name of the layer, and which are of other parameters, by theirs.

    Raises:
        ValueError: the model has no such parameter, it is of another shape, or two names are one parameter.
    """
    parameters = base_parameters(model)
    check_names("the update", [*entries, *dense], parameters)
    names: dict[int, str] = {}
    for name in (*entries, *dense):
        first = names.setdefault(id(parameters[name]), name)
        if first != name or (name in entries and name in dense):
            raise ValueError(f"the update changes {name} twice in this model, also as {first}")
    holders = [id(parameter) for parameter in parameters.values()]
    linear: dict[str, Entries] = {}
    rest: dict[str, Entries] = {}
    for name, one in entries.items():
        parameter, (module_name, _, last) = parameters[name], name.rpartition(".")
        layer = base_layer(model.get_submodule(module_name))
        is_linear = last == "weight" and isinstance(layer, nn.Linear) and holders.count(id(parameter)) == 1
        shape = weight_shape(layer) if is_linear else tuple(parameter.shape)
        if tuple(one.shape) != shape:
            raise ValueError(f"the update is of {name} as {list(one.shape)}, and the model has {list(shape or ())}")
        if is_linear:
            linear[module_name] = one
        else:
            rest[name] = one
    return linear, rest


@torch.no_grad()
def changes_of(
    model: nn.Module, rest: Mapping[str, Entries], dense: Mapping[str, Tensor], scaling: float
) -> list[Change]:
    """What is to be written into parameters: ``rest`` added to them, ``dense`` in their place.

    Raises:
        ValueError: a shape is another one, a parameter is packed, or a sum is not finite.
    """
    parameters = base_parameters(model)
    changes = []
    for name, one in rest.items():
        parameter = _plain(name, parameters[name])
        positions = one.flat.to(parameter.device)
        before = _read(parameter, positions).clone()
        values = one.values.to(parameter.device, torch.promote_types(one.values.dtype, torch.float32))
        after = (before.to(values.dtype) + scaling * values).to(parameter.dtype)
        changes.append(Change(name, parameter, positions, before, after))
    for name, tensor in dense.items():
        parameter = _plain(name, parameters[name])
        if tensor.shape != parameter.shape:
            raise ValueError(f"the update has {name} as {list(tensor.shape)}, and the model {list(parameter.shape)}")
        after = tensor.to(parameter.device, parameter.dtype, copy=True)
        changes.append(Change(name, parameter, None, parameter.detach().clone(), after))
    for change in changes:
        if not bool(change.after.isfinite().all()):
            raise ValueError(f"what the update makes of {change.name} is not finite; nothing was changed")
    return changes


def _plain(name: str, parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in FLOAT_DTYPES:
        raise ValueError(f"the update changes {name}, which holds {parameter.dtype} here; load the model dense")
    return parameter


@torch.no_grad()
def _read(parameter: nn.Parameter, positions: Tensor | None) -> Tensor:
    if positions is None:
        return parameter.detach()
    return parameter[torch.unravel_index(positions, parameter.shape)]


@torch.no_grad()
def _write(parameter: nn.Parameter, positions: Tensor | None, numbers: Tensor) -> None:
    if positions is None:
        parameter.copy_(numbers)
    else:
        parameter[torch.unravel_index(positions, parameter.shape)] = numbers
