"""A linear layer with sparse deltas: y = layer(x) + Σₖ sₖ x Sₖᵀ, over a base of any kind.

The layer stays the object it is. It gets a subclass of its own class, and its deltas sit in a child module by name:

    layer.sparse_deltas["default"].values        the trained values, one for each entry of the index set

Nothing of the layer's own state dict changes; the deltas add keys of their own. `peftkern.sparse` puts deltas on the
layers of a model, and `peftkern.patch` runs base, adapters and deltas as one operation.

Source: Composable Sparse Fine-Tuning, Ansell et al. 2022 (arXiv:2110.07560), section 3; RoSA, Nikdan et al. 2024
(arXiv:2401.04679), section 4.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.formats import QuantizedTensor
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.ops.sparse_delta_linear import add_sparse_delta

_SAVED = ("values", "row_offsets", "columns")
_DERIVED = ("column_offsets", "rows", "order")
_UNDER = "_peftkern_under_deltas"


class SparseDelta(nn.Module):
    """Trained values at a set of entries of a weight.

    Calling it with the base product y and the input x returns y + scaling · x Sᵀ.

    Attributes:
        values: parameter [entries], in row order. Casts of the module to another floating-point dtype leave it as it
            is; it is of the dtype that it was made with.
        indices: the entries. Their tensors are buffers.
        scaling: factor of the values.
        active: whether the delta takes part in the forward of its layer.
        merged: whether it is part of the layer's weight now, and so takes no part in its forward.
    """

    row_offsets: Tensor
    columns: Tensor

    def __init__(self, indices: SparseIndices, values: Tensor, scaling: float = 1.0) -> None:
        """Takes over ``indices`` and ``values``, [entries], without a copy.

        Raises:
            ValueError: lengths or devices do not fit each other.
            TypeError: ``values`` is not floating-point.
        """
        super().__init__()
        _check(indices, values)
        self.shape = torch.Size(indices.shape)
        self.scaling = float(scaling)
        self.active = True
        self.merged = False
        self.values = nn.Parameter(values.detach())
        self._install(indices)

    def _install(self, indices: SparseIndices) -> None:
        self.register_buffer("row_offsets", indices.row_offsets)
        self.register_buffer("columns", indices.columns)
        for name in _DERIVED:
            self.register_buffer(name, getattr(indices, name), persistent=False)
        self._view: SparseIndices | None = indices

    def __len__(self) -> int:
        return self.columns.shape[0]

    @property
    def indices(self) -> SparseIndices:
        """The entries; the buffers' own memory."""
        if torch.compiler.is_compiling():  # a view must not outlive the trace
            return self._make_view()
        if self._view is None or self._view.columns is not self._buffers["columns"]:
            self._view = self._make_view()
        return self._view

    def _make_view(self) -> SparseIndices:
        derived = (cast(Tensor, self._buffers[name]) for name in _DERIVED)
        return SparseIndices(self.shape, self.row_offsets, self.columns, *derived)

    def running(self) -> bool:
        """Whether the delta is active and not merged into the weight."""
        return self.active and not self.merged

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return add_sparse_delta(y, x, self.values, self.indices, self.scaling)

    @torch.no_grad()
    def replace_(self, indices: SparseIndices, values: Tensor) -> None:
        """Hold another index set of the same shape, of any size, and its values, [entries].

        ``values`` stays the parameter that it is, so that an optimizer keeps training it. Its gradient is dropped; the
        state that an optimizer keeps of it has to move along, see `peftkern.optim.AdamW.reindex`.

        Raises:
            ValueError: shape, lengths or devices do not fit, or the delta is merged into the weight.
            TypeError: ``values`` is not floating-point.
        """
        _check(indices, values)
        if tuple(indices.shape) != tuple(self.shape):
            raise ValueError(f"replace_: indices must be of shape {list(self.shape)}, got {list(indices.shape)}")
        if values.device != self.values.device:
            raise ValueError(f"replace_: the delta is on {self.values.device}, values on {values.device}")
        if self.merged:
            raise ValueError("replace_: the delta is merged into the weight; unmerge it first")
        resize_(self.values, values.detach())
        self._install(indices)

    # ---- moving, copying, state dict

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseDelta:
        def keeping_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise RuntimeError(
                f"state_dict: {prefix.rstrip('.')} is merged into the weight, and would act twice when loaded; unmerge "
                "it first, or keep the merged weight alone: peftkern.sparse.detach(model, name, keep_merged=True)"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # the parent finds unexpected keys; it must not see tensors of another number of entries
        own = {prefix + name for name in _SAVED}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, [], unexpected_keys, error_msgs)
        missing = [prefix + name for name in _SAVED if prefix + name not in state_dict]
        missing_keys.extend(missing)
        if missing:
            return
        try:
            self._load(*(state_dict[prefix + name] for name in _SAVED))
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def _load(self, values: Tensor, row_offsets: Tensor, columns: Tensor) -> None:
        _check_dtype(values)
        # always a copy: two models that load one dictionary must not share what they train
        indices = _read_indices(row_offsets, columns, self.shape).to(self.values.device)
        self.replace_(indices, values.to(self.values.device, self.values.dtype, copy=True))

    def extra_repr(self) -> str:
        return f"{len(self)} entries, density={self.indices.density:.3g}, scaling={self.scaling}, active={self.active}"


def resize_(parameter: nn.Parameter, data: Tensor) -> None:
    """Let ``parameter``, which stays the object that it is, hold ``data``, of any shape. Its gradient is dropped."""
    parameter.grad = None
    # Autograd remembers the size of a parameter as long as any graph that it is in lives, and refuses gradients of
    # another size. Passing through another dtype is what makes it forget.
    parameter.data = torch.empty(0, dtype=torch.complex64, device=data.device)
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)


def _check(indices: SparseIndices, values: Tensor) -> None:
    indices.validate()
    _check_dtype(values)
    if tuple(values.shape) != (len(indices),):
        raise ValueError(f"SparseDelta: values must be [entries] = [{len(indices)}], got {list(values.shape)}")
    if values.device != indices.device:
        raise ValueError(f"SparseDelta: values are on {values.device} and indices on {indices.device}")


def _check_dtype(values: Tensor) -> None:
    if values.dtype not in FLOAT_DTYPES:
        raise TypeError(f"SparseDelta: values must be float64, float32, bfloat16 or float16, got {values.dtype}")


def _read_indices(row_offsets: Tensor, columns: Tensor, shape: torch.Size) -> SparseIndices:
    """The index set that a checkpoint describes; its numbers are checked, because kernels rely on them."""
    out_features, in_features = shape
    if tuple(row_offsets.shape) != (out_features + 1,) or columns.dim() != 1:
        got = f"{list(row_offsets.shape)} and {list(columns.shape)}"
        raise ValueError(f"row_offsets must be [{out_features + 1}] and columns [entries], the checkpoint has {got}")
    counts = row_offsets.to(torch.int64).diff()
    if int(row_offsets[0]) != 0 or int(row_offsets[-1]) != columns.shape[0] or bool((counts < 0).any()):
        raise ValueError(f"row_offsets must ascend from 0 to the number of entries, {columns.shape[0]}")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < in_features:
        raise ValueError(f"columns must be within 0 and {in_features - 1}")
    rows = torch.repeat_interleave(torch.arange(out_features, device=counts.device), counts)
    return SparseIndices.from_flat(rows * in_features + columns, shape)


# ---- the class of layers that carry deltas


@dataclass
class Merge:
    """What merging a delta changed.

    Attributes:
        before: the entries that were overwritten, [entries] in the dtype of the weight, or the whole packed weight.
        after: what was written there, [entries]; of a quantized layer, the parameter that took the place of its weight.
    """

    before: Tensor | QuantizedTensor
    after: Tensor


class SparseDeltas(nn.ModuleDict):
    """The deltas of one layer by name.

    Attributes:
        weight_was_trained: whether the layer's weight asked for a gradient before the first delta was attached.
        merges: of the deltas that are merged into the weight, in the order in which they were merged.
    """

    def __init__(self, weight_was_trained: bool) -> None:
        super().__init__()
        self.weight_was_trained = weight_was_trained
        self.merges: dict[str, Merge] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseDeltas:
        for merge in self.merges.values():
            if isinstance(merge.before, Tensor):  # cast with the weight, so that unmerging gives what its cast gives
                merge.before, merge.after = fn(merge.before), fn(merge.after)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def deltas_of(layer: nn.Module) -> dict[str, SparseDelta]:
    """The deltas of ``layer`` by name; empty where it has none."""
    deltas = layer._modules.get("sparse_deltas")
    return cast(dict[str, SparseDelta], dict(deltas._modules)) if isinstance(deltas, SparseDeltas) else {}


def under_deltas(layer_class: type) -> type:
    """The class that a class with deltas was made of; any other class is its own."""
    under: type = getattr(layer_class, _UNDER, layer_class)
    return under


@functools.cache
def class_with_deltas(under: type) -> type:
    """The subclass of a class of linear layers that adds deltas, one per class.

    It has the name of the class that it was made of, because PEFT and others look at class names.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = under.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
        for delta in self._modules["sparse_deltas"]._modules.values():
            if delta.running():
                y = delta(y, x)
        return y

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (under,), self.__getstate__()

    def dequantize_(self: Any, dtype: torch.dtype | None = None) -> nn.Module:
        under.dequantize_(self, dtype)  # type: ignore[attr-defined]
        self.__class__ = class_with_deltas(nn.Linear)
        return self  # type: ignore[no-any-return]

    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": under.__qualname__,
        "__doc__": f"{under.__qualname__} with sparse deltas.",
        "__reduce_ex__": reduce,
        _UNDER: under,
        "forward": forward,
    }
    if hasattr(under, "dequantize_"):  # of `QuantizedLinear`, which becomes another class there
        namespace["dequantize_"] = dequantize_
    return types.new_class(under.__name__, (under,), {}, lambda body: body.update(namespace))


def _rebuild(under: type) -> Any:
    """An empty instance of the class with deltas, for `pickle` and `copy`, which then fill in its state."""
    return object.__new__(class_with_deltas(under))
