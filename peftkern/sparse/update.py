"""What sparse fine-tuning has changed in a model, apart from the model: θ = θ₀ + scaling · φ, φ sparse.

    update = SparseUpdate.from_model(model)                  # after training
    update.save("update")
    (load("a") + 0.5 * load("b")).attach_to(base)            # beside the weights, dense or quantized
    applied = update.merge_into(base)                        # into the weights
    applied.revert()                                         # and out again, to the last bit

Updates add up entry by entry, where they overlap as well. What is kept dense (a new head) is no difference but the
tensor itself, and takes the place of what the model has.

Source: Composable Sparse Fine-Tuning, Ansell et al. 2022 (arXiv:2110.07560), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats import SparseIndices
from peftkern.integrations.fingerprint import (
    Fingerprint,
    WrongBaseError,
    base_of,
    base_parameters,
    difference_to_base,
    plain_name,
    unwrapped,
)
from peftkern.nn.sparse_linear import SparseDelta
from peftkern.sparse import update_file
from peftkern.sparse.applied import Applied, changes_of, check_names, read_parameters
from peftkern.sparse.layers import attach, deltas
from peftkern.sparse.update_file import Entries


@dataclass(frozen=True, eq=False)
class SparseUpdate:
    """A sparse difference between two models.

    Attributes:
        entries: by name of a parameter of the model without adapters: which of its entries change, and by how much.
        base: of the model that it is the difference to.
        dense: by name of a parameter: what it is replaced by.
        scaling: factor of all values.
        method: that found it.
        metadata: anything that JSON takes.
    """

    entries: Mapping[str, Entries]
    base: Fingerprint
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    method: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    # ---- made from models, saved and loaded

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        name: str = "default",
        *,
        dense: Iterable[str] = (),
        method: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> SparseUpdate:
        """A copy of the deltas called ``name`` of ``model``.

        The base is the model as it was when it got its first delta: what is trained beside the deltas does not count.

        Args:
            model: that has the deltas, with or without PEFT's adapters, which are not part of the update.
            name: of the deltas.
            dense: names of parameters (of the model without adapters) that are taken along as they are, such as a head.
            method, metadata: see `SparseUpdate`.

        Raises:
            ValueError: no layer has such a delta, or ``dense`` names no parameter.
        """
        whole = unwrapped(model)
        found = {f"{plain_name(layer_name)}.weight": delta for layer_name, delta in deltas(whole, name).items()}
        scalings = {delta.scaling for delta in found.values()}
        common = scalings.pop() if len(scalings) == 1 else None
        entries = {key: _entries_of(delta, folded=common is None) for key, delta in found.items()}
        parameters = base_parameters(whole)
        check_names("from_model: dense", dense, parameters)
        tensors = {key: parameters[key].detach().cpu().clone() for key in dense}
        scaling = 1.0 if common is None else common
        return cls(entries, base_of(model), tensors, scaling, method, dict(metadata or {}))

    @classmethod
    def from_difference(
        cls,
        base_state: Mapping[str, Tensor],
        tuned_state: Mapping[str, Tensor],
        base: Fingerprint,
        tolerance: float = 1e-7,
        *,
        dense: Iterable[str] = (),
        method: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> SparseUpdate:
        """The entries in which two state dicts differ by more than ``tolerance``.

        Args:
            base_state, tuned_state: dense tensors by the same names, for example of ``model.state_dict()``.
            base: ``Fingerprint.of(model)`` of the model that ``base_state`` is of.
            tolerance: the largest difference that counts as none.
            dense: names of tensors that are taken along whole, from ``tuned_state``, instead of their difference.
            method, metadata: see `SparseUpdate`.

        Raises:
            ValueError: names or shapes differ, a tensor is no floating-point one but differs, or a difference is not
                finite.
        """
        whole = set(dense)
        check_names("from_difference: dense", whole, tuned_state)
        check_names("from_difference: base_state", base_state.keys() - whole, tuned_state)
        check_names("from_difference: tuned_state", tuned_state.keys() - whole, base_state)
        entries: dict[str, Entries] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, tuned in tuned_state.items():
            identity = (tuned.data_ptr(), tuned.shape)
            if name in whole or (tuned.numel() and identity in seen):  # tied tensors have two names
                continue
            seen.add(identity)
            found = _difference(name, base_state[name], tuned, tolerance)
            if found is not None:
                entries[name] = found
        tensors = {name: tuned_state[name].detach().cpu().clone() for name in whole}
        return cls(entries, base, tensors, 1.0, method, dict(metadata or {}))

    def save(self, folder: str | Path) -> None:
        """Write the update to ``folder``, as one safetensors file and a JSON file; see `update_file`.

        An update that was there before is replaced at once, when all of this one is written.

        Raises:
            OSError: the folder cannot be written.
            TypeError: ``metadata`` holds something that JSON does not take.
        """
        config = {
            "method": self.method,
            "scaling": self.scaling,
            "base": self.base.to_dict(),
            "metadata": dict(self.metadata),
        }
        update_file.save(Path(folder), config, self.entries, self.dense)

    @classmethod
    def load(cls, folder: str | Path) -> SparseUpdate:
        """What `save` has written to ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is torn, was changed, was written by a newer version, or is not what it says that it is.
        """
        config, entries, dense = update_file.load(Path(folder))
        try:
            base = Fingerprint.from_dict(config["base"])
        except ValueError as error:
            raise ValueError(f"SparseUpdate.load: {folder}: {error}") from None
        return cls(entries, base, dense, config["scaling"], config["method"], config["metadata"])

    # ---- arithmetic

    def __len__(self) -> int:
        return sum(len(one.flat) for one in self.entries.values())

    def __mul__(self, factor: float) -> SparseUpdate:
        """The difference times ``factor``; what is dense stays as it is."""
        return replace(self, scaling=self.scaling * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> SparseUpdate:
        return self * -1.0

    def __add__(self, other: SparseUpdate) -> SparseUpdate:
        """Both differences to one base. What is dense in both must be the same.

        Raises:
            ValueError: the bases differ, shapes differ, or both hold another dense tensor of one name.
        """
        difference = self.base.difference(other.base)
        if difference is not None:
            raise WrongBaseError(
                f"the updates are of different models, {self.base.model!r} and {other.base.model!r}: {difference}"
            )
        for name in self.dense.keys() & other.dense.keys():
            if not torch.equal(self.dense[name], other.dense[name]):
                raise ValueError(
                    f"both updates hold {name} dense, and each another one; take it from one of them: "
                    "a + b.without_dense()"
                )
        mine, theirs, scaling = self._folded_like(other)
        entries = {**self.entries, **other.entries}
        for name in entries:
            entries[name] = _added(name, mine.get(name), theirs.get(name))
        method = self.method if self.method == other.method else " + ".join(filter(None, (self.method, other.method)))
        metadata = {**other.metadata, **self.metadata}
        return SparseUpdate(entries, self.base, {**other.dense, **self.dense}, scaling, method, metadata)

    def __sub__(self, other: SparseUpdate) -> SparseUpdate:
        """This difference without that of ``other``.

        Raises:
            ValueError: as for a sum; or ``other`` holds dense tensors, which are no differences.
        """
        if other.dense:
            names = ", ".join(other.dense)
            raise ValueError(f"what is dense cannot be subtracted: {names}; subtract other.without_dense()")
        return self + -other

    def without_dense(self) -> SparseUpdate:
        """The sparse difference alone, for example without a head that belongs to another task."""
        return replace(self, dense={})

    def _folded_like(self, other: SparseUpdate) -> tuple[Mapping[str, Entries], Mapping[str, Entries], float]:
        if self.scaling == other.scaling:
            return self.entries, other.entries, self.scaling
        return _folded(self), _folded(other), 1.0

    # ---- in a model

    def attach_to(self, model: nn.Module, name: str = "default", *, trainable: bool = False) -> Applied:
        """Let the update act in ``model``: beside the weights of its linear layers, so that it may be quantized.

        What is not in a linear layer (embeddings, norms, biases, tied weights, dense tensors) is written into its
        parameter. All of it happens or nothing.

        Args:
            model: the base that the update is of, dense or quantized, with or without PEFT's adapters or other updates.
            name: of the deltas, as for `attach`; several updates need several names, and add up.
            trainable: whether the values are trained on.

        Returns:
            What takes the update out again.

        Raises:
            WrongBaseError: ``model`` is another base.
            ValueError: the model has no such parameter or another shape there, deltas called ``name`` are there
                already, or a sum is not finite.
        """
        self.check_base(model)
        whole = unwrapped(model)
        linear, rest = read_parameters(whole, self.entries, self.dense)
        indices = {layer: SparseIndices.from_flat(one.flat, one.shape) for layer, one in linear.items()}
        values = {layer: one.values for layer, one in linear.items()}
        changes = changes_of(whole, rest, self.dense, self.scaling)
        attached = attach(whole, indices, name, values=values, scaling=self.scaling)
        for delta in attached.values():
            delta.values.requires_grad_(trainable)
        for change in changes:
            change.apply()
        return Applied(whole, name if attached else None, changes)

    def merge_into(self, model: nn.Module, name: str = "default", *, requantize: bool = False) -> Applied:
        """Add the update to the weights of ``model``; `Applied.revert` gives them their bits back.

        Args:
            model, name: as for `attach_to`.
            requantize: for quantized layers, which otherwise refuse; as for `merge`. The error of each layer is
                in the result's ``errors``.

        Raises:
            WrongBaseError, ValueError: as `attach_to` and `merge` do. The model is as before.
        """
        applied = self.attach_to(model, name)
        try:
            applied.merge(requantize)
        except BaseException:
            applied.revert()
            raise
        return applied

    def check_base(self, model: nn.Module) -> None:
        """Raise where ``model`` is another base than the one of this update.

        Raises:
            WrongBaseError: it is; the message names both.
        """
        difference = difference_to_base(self.base, model)
        if difference is not None:
            raise WrongBaseError(
                f"the update is of {self.base.model!r}, and the model is {base_of(model).model!r}: {difference}"
            )


# ---- entries


def _entries_of(delta: SparseDelta, folded: bool) -> Entries:
    values = delta.values.detach()
    values = values * delta.scaling if folded else values
    return Entries(delta.shape, delta.indices.flat().cpu(), values.cpu().clone())


def _difference(name: str, base: Tensor, tuned: Tensor, tolerance: float) -> Entries | None:
    if base.shape != tuned.shape:
        raise ValueError(f"from_difference: {name} is {list(base.shape)} in one and {list(tuned.shape)} in the other")
    if not base.is_floating_point() or not tuned.is_floating_point() or tuned.dim() == 0:
        if not torch.equal(base, tuned):
            raise ValueError(f"from_difference: {name} is {tuned.dtype} {list(tuned.shape)} and differs; take it dense")
        return None
    dtype = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    difference = (tuned.detach().to(dtype) - base.detach().to(tuned.device, dtype)).reshape(-1)
    if not bool(difference.isfinite().all()):
        raise ValueError(f"from_difference: {name} differs by something that is not finite")
    flat = (difference.abs() > tolerance).nonzero().reshape(-1)
    return Entries(tuned.shape, flat.cpu(), difference[flat].cpu()) if len(flat) else None


def _folded(update: SparseUpdate) -> dict[str, Entries]:
    return {name: replace(one, values=one.values * update.scaling) for name, one in update.entries.items()}


def _added(name: str, one: Entries | None, other: Entries | None) -> Entries:
    if one is None or other is None:
        present = one or other
        assert present is not None
        return present
    if one.shape != other.shape:
        raise ValueError(f"{name} is {list(one.shape)} in one update and {list(other.shape)} in the other")
    flat, places = torch.unique(torch.cat([one.flat, other.flat]), return_inverse=True)
    total = torch.zeros(len(flat), dtype=torch.promote_types(one.values.dtype, other.values.dtype))
    # two addends per place at most: the order does not show
    total.index_add_(0, places[: len(one.flat)], one.values.to(total.dtype))
    total.index_add_(0, places[len(one.flat) :], other.values.to(total.dtype))
    return Entries(one.shape, flat, total)
