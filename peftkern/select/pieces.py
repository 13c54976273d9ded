"""Parameters, and row ranges of parameters, that a method trains while it leaves the others alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from peftkern.nn.row_sliced_linear import Range, check_sliceable, slice_rows, unslice


class Piece(Protocol):
    """What is trained or frozen in one go: parameters of a module, or the same rows of each."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> Range | None: ...


def check_dense(method: str, model: nn.Module) -> None:
    """Raise `ValueError`, in the name of ``method``, where ``model`` has adapters or quantized parameters."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{method}: the model carries PEFT adapters, and this method trains the matrices themselves; "
            "call merge_and_unload() first"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{method}: {name} is quantized ({parameter.dtype}), and this method trains dense matrices; "
                f"load the model without quantization, or train LoRA adapters or sparse deltas over it"
            )


def check_pieces(model: nn.Module, pieces: Iterable[Piece]) -> None:
    """Raise `TypeError` where `take_pieces` cannot take the rows of a piece."""
    for piece in pieces:
        if piece.rows is not None:
            check_sliceable(model.get_submodule(piece.module), piece.parameters[0])


def take_pieces(model: nn.Module, pieces: Sequence[Piece]) -> dict[str, list[nn.Parameter]]:
    """The parameters of every piece, by its name; row ranges become parameters of their own until `give_back`."""
    taken: dict[str, list[nn.Parameter]] = {}
    sliced = defaultdict[tuple[str, str], list[Piece]](list)
    for piece in pieces:
        if piece.rows is None:
            module = model.get_submodule(piece.module)
            taken[piece.name] = [module.get_parameter(name) for name in piece.parameters]
        else:
            sliced[piece.module, piece.parameters[0]].append(piece)
    for (module_name, parameter), parts in sliced.items():
        ranges = [piece.rows for piece in parts if piece.rows is not None]
        slices = slice_rows(model.get_submodule(module_name), parameter, ranges)
        taken.update({piece.name: own for piece, own in zip(parts, slices, strict=True)})
    return taken


def give_back(model: nn.Module, pieces: Iterable[Piece], asked: Mapping[str, bool]) -> None:
    """Undo `take_pieces`, and let the parameters that ``asked`` names require a gradient or not, as it says."""
    for name in dict.fromkeys(piece.module for piece in pieces if piece.rows is not None):
        unslice(model.get_submodule(name))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(asked[name])


@contextmanager
def probing(model: nn.Module, training: bool) -> Iterator[None]:
    """No parameter of ``model`` asks for a gradient, and all of it is in training or evaluation mode, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.train(training).requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
