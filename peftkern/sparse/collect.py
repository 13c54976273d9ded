"""The gradient of linear layers' weights in pieces: never all of it, and no layer's in full.

    dW = dyᵀ x          x [tokens, in] the input of a layer, dy [tokens, out] the gradient of its output

Rows of dW are rows of dyᵀ: a tile of them is formed, read and forgotten. The weight itself is not looked at, so that it
may be quantized.

    with LayerGradients(layers, receive):
        model(**batch).loss.backward()          # calls receive(name, x, dy) for each layer, when backward reaches it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.backends import registry
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.ops.lora_linear import as_matrix
from peftkern.ops.select_top import select_top

TILE_ELEMENTS = 1 << 18
"""Entries of dW that are there at a time: 1 MiB of them."""

Receive = Callable[[str, Tensor, Tensor], None]


class LayerGradients:
    """Hooks on linear layers that hand on their input and the gradient of their output in every backward pass.

    Outputs ask for a gradient as long as the hooks are there, even where nothing below is trained. Inputs are kept for
    the backward pass as autograd keeps any tensor, so that activation checkpointing computes them anew. Fused paths of
    `peftkern.patch` step aside for a layer with hooks.

    Args:
        layers: by name; of a PEFT layer the layer itself, not the one beneath.
        receive: called with the name, x [tokens, in] and dy [tokens, out], both as they are, without a copy.
    """

    def __init__(self, layers: Mapping[str, nn.Module], receive: Receive) -> None:
        self._receive = receive
        self._handles = [
            layer.register_forward_hook(self._watch(name), with_kwargs=True) for name, layer in layers.items()
        ]

    def _watch(self, name: str) -> Callable[..., Tensor | None]:
        def watch(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            asks = torch.empty(0, requires_grad=True)
            watched: Tensor = _Watched.apply(output, x.detach(), asks, self._receive, name)  # type: ignore[no-untyped-call]
            return watched

        return watch

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> LayerGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Watched(torch.autograd.Function):
    """The output of a layer as it is; its backward pass tells what it sees."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, _asks: Tensor, receive: Receive, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive, ctx.name = receive, name
        # not a view in autograd's eyes, which may not be modified in place
        unchanged: Tensor = torch.ops.aten._unsafe_view(output, list(output.shape))
        return unchanged

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.receive(ctx.name, as_matrix(x), as_matrix(grad))
        return grad if ctx.needs_input_grad[0] else None, None, None, None, None


def gradient_tiles(x: Tensor, grad: Tensor) -> Iterator[tuple[int, Tensor]]:
    """dW in tiles of rows: the first row of each, and the tile [rows, in] float32.

    Args:
        x: [tokens, in], any floating-point dtype; one float32 copy of it is made.
        grad: [tokens, out].
    """
    rows = max(1, TILE_ELEMENTS // max(x.shape[1], 1))
    x = x.float()
    for begin in range(0, grad.shape[1], rows):
        yield begin, grad[:, begin : begin + rows].float().t() @ x


def gradient_at(x: Tensor, grad: Tensor, indices: SparseIndices) -> Tensor:
    """The entries of dW at ``indices``, [entries] float32, each a product of one column of dy and one of x.

    Args:
        x: [tokens, in], float32, bfloat16 or float16.
        grad: [tokens, out].
        indices: of a matrix [out, in].
    """
    unread = torch.empty(len(indices), dtype=torch.float32, device=x.device)
    entries: Tensor = registry.run("sparse_delta_backward", grad, x, None, unread, indices, 1.0, True)
    return entries


class TopEntries:
    """The ``k`` entries of largest magnitude of a matrix that comes in pieces, in order; ties to the lower index.

    It holds up to 2k entries and those of one piece.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._bound = -1.0  # of the k that are kept; what comes later has to be larger
        self._flat: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, first: int, piece: Tensor) -> None:
        """Look at ``piece``, float32 of any shape, whose first entry has the flat index ``first``.

        Raises:
            ValueError: an entry is NaN; where it does not show yet, `result` raises it.
        """
        flat_piece = piece.reshape(-1)
        places = (~(flat_piece.abs() <= self._bound)).nonzero().reshape(-1)
        self._flat.append(places + first)
        self._values.append(flat_piece[places])
        if sum(map(len, self._flat)) > 2 * self._k:
            self._cut()

    def _cut(self) -> None:
        flat, values = torch.cat(self._flat), torch.cat(self._values)
        kept = select_top([values], min(self._k, len(values)))[0]
        self._flat, self._values = [flat[kept]], [values[kept]]
        if len(kept) == self._k:
            self._bound = float(self._values[0].abs().min()) if self._k else float("inf")

    def result(self) -> tuple[Tensor, Tensor]:
        """Flat indices, ascending int64, and the entries there; fewer than ``k`` where the matrix has fewer."""
        self._cut()
        return self._flat[0], self._values[0]


def top_of_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Flat indices of the ``k`` entries of dW of largest magnitude, ascending int64; ties to the lower index."""
    top = TopEntries(k)
    for first_row, tile in gradient_tiles(x, grad):
        top.add(first_row * x.shape[1], tile)
    return top.result()[0]
