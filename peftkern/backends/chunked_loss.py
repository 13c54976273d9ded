"""The loss of a language model's head in chunks of tokens: on the CPU and on GPUs.

Products are PyTorch's own, but for the scores on the CPU. Scores, probabilities and errors of a chunk follow each other
in one buffer of [chunk, vocabulary]. A weight that is not in the dtype of PyTorch's products, quantized ones among
them, is taken there a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.backends.triton.launch import is_ours
from peftkern.ops.dequantize import row_blocks
from peftkern.ops.linear_cross_entropy import LowRank, Needs, Result, Terms
from peftkern.ops.lora_linear import Weight, compute_dtype

_BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Of the scores of one chunk: more tokens make better use of the weight, which every chunk reads again."""

_assumed_device: str | None = None


@contextmanager
def assuming(device: str) -> Iterator[None]:
    """Inside, chunks are as long as they are on this type of device, whatever device the tensors are on."""
    global _assumed_device
    before, _assumed_device = _assumed_device, device
    try:
        yield
    finally:
        _assumed_device = before


_FEWEST_ROWS = 64
_MOST_ROWS = 1024
_BLOCK = 8192
"""Rows of such a weight that are multiplied at once."""


def _supports_cpu(hidden: Tensor, *_rest: object) -> str | None:
    return None if hidden.device.type == "cpu" else registry.ELSEWHERE


def _supports_cuda(hidden: Tensor, *_rest: object) -> str | None:
    return None if hidden.device.type == "cuda" else registry.ELSEWHERE


def _supports_triton(hidden: Tensor, *_rest: object) -> str | None:
    return None if is_ours(hidden) else registry.ELSEWHERE


Multiply = Callable[[Tensor, Weight, Tensor], None]
"""Writes rows Wᵀ to its last argument."""


@registry.register("linear_cross_entropy", "triton", supports=_supports_triton)
@registry.register("linear_cross_entropy", "cuda", supports=_supports_cuda)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    terms: Terms,
    needs: Needs,
    low_rank: LowRank | None = None,
    *,
    multiply: Multiply | None = None,
) -> Result:
    """See :func:`peftkern.ops.linear_cross_entropy.linear_cross_entropy_reference`.

    ``multiply`` makes the scores, instead of PyTorch's products with blocks of the weight.
    """
    dtype, (vocabulary, features) = compute_dtype(hidden), weight.shape
    losses = hidden.new_zeros(len(labels), dtype=dtype)
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    grad_weight = hidden.new_zeros(vocabulary, features, dtype=dtype) if needs.weight else None
    grad_bias = hidden.new_zeros(vocabulary, dtype=dtype) if needs.bias else None
    grad_inner = torch.zeros_like(low_rank.inner) if low_rank is not None and needs.inner else None
    grad_lora_B = torch.zeros_like(low_rank.lora_B) if low_rank is not None and needs.lora_B else None
    head = _Head(weight, bias, terms, hidden.dtype, None if low_rank is None else low_rank.lora_B, multiply)
    buffer: Tensor | None = None
    for tokens in _chunks(labels, vocabulary, terms.ignore_index):
        if buffer is None:
            buffer = hidden.new_empty(len(tokens), vocabulary, dtype=dtype)
        rows, inner = hidden[tokens], None if low_rank is None else low_rank.inner[tokens]
        factor = None if token_weights is None else token_weights[tokens].to(dtype)
        chunk_losses, error = head.losses(rows, inner, labels[tokens], buffer[: len(tokens)], any(needs))
        losses[tokens] = chunk_losses if factor is None else chunk_losses * factor
        if grad_hidden is not None:
            grad = head.back_to_hidden(error)
            grad_hidden[tokens] = (grad if factor is None else grad * factor[:, None]).to(hidden.dtype)
        if grad_weight is not None:
            head.add_weight_gradient(grad_weight, error, rows if factor is None else rows * factor[:, None])
        if grad_bias is not None:
            grad_bias += error.sum(0) if factor is None else factor @ error
        if low_rank is not None and grad_inner is not None:
            grad = error @ low_rank.lora_B
            grad_inner[tokens] = grad if factor is None else grad * factor[:, None]
        if inner is not None and grad_lora_B is not None:
            grad_lora_B.addmm_(error.t(), inner if factor is None else inner * factor[:, None])
    del buffer
    parameters = _as(grad_weight, hidden.dtype), _as(grad_bias, hidden.dtype)
    return Result(losses, grad_hidden, *parameters, grad_inner, grad_lora_B)


@registry.register("linear_cross_entropy", "cpu", supports=_supports_cpu)
def linear_cross_entropy_on_cpu(hidden: Tensor, weight: Weight, *arguments: Any) -> Result:
    """The same. PyTorch's product takes a fifth longer for a chunk's scores, and cannot widen or decode as it goes."""
    is_built = cpu.supports_values(hidden) is None
    return linear_cross_entropy(hidden, weight, *arguments, multiply=cpu.multiply if is_built else None)


def _as(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _chunks(labels: Tensor, vocabulary: int, ignore_index: int) -> Iterator[Tensor]:
    """The indices of the tokens with a label, in chunks of nearly equal length, the first the longest."""
    labelled = (labels != ignore_index).nonzero().squeeze(1)
    if len(labelled) == 0:
        return
    rows = _BUFFER_BYTES[_assumed_device or labels.device.type] // (4 * vocabulary)
    rows = min(max(rows, _FEWEST_ROWS), _MOST_ROWS)
    yield from labelled.tensor_split(-(-len(labelled) // rows))


class _Block(NamedTuple):
    """Consecutive rows of the weight, as they are multiplied."""

    first: int
    end: int
    weight: Tensor


class _Head:
    """The weight, its low-rank part, its bias and what is done to the scores."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        terms: Terms,
        dtype: torch.dtype,
        lora_B: Tensor | None,
        multiply: Multiply | None,
    ) -> None:
        self._weight, self._bias, self._terms, self._lora_B = weight, bias, terms, lora_B
        self._multiply = multiply or self._multiply_blocks
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # PyTorch multiplies float16 on the CPU element by element
        is_slow = dtype == torch.float16 and weight.device.type == "cpu"
        self._operand_dtype = wide if is_slow else dtype
        as_it_is = isinstance(weight, Tensor) and weight.dtype == wide
        self._rows_at_once = max(weight.shape[0], 1) if as_it_is else _BLOCK

    def _blocks(self) -> Iterator[_Block]:
        first = 0
        for rows in row_blocks(self._weight, self._rows_at_once, self._operand_dtype):
            yield _Block(first, first + len(rows), rows.to(self._operand_dtype))
            first += len(rows)

    def losses(
        self, rows: Tensor, inner: Tensor | None, labels: Tensor, buffer: Tensor, need_error: bool
    ) -> tuple[Tensor, Tensor]:
        """ℓ of a chunk, and e where it is needed, which is in ``buffer``. rows is [chunk, hidden], inner [chunk, r]."""
        terms, target = self._terms, labels[:, None]
        slope = self._scores(rows, inner, buffer)
        spread = terms.label_smoothing / buffer.shape[1]
        aimed = buffer.gather(1, target) * (1.0 - terms.label_smoothing)
        if spread:
            aimed += spread * buffer.sum(1, keepdim=True)
        largest = buffer.amax(1, keepdim=True)
        denominator = buffer.sub_(largest).exp_().sum(1, keepdim=True)
        logsumexp = denominator.log() + largest
        losses = logsumexp - aimed + terms.z_loss * logsumexp * logsumexp
        if need_error:
            buffer.mul_((1.0 + 2.0 * terms.z_loss * logsumexp) / denominator)
            if spread:
                buffer.sub_(spread)
            buffer.scatter_add_(1, target, torch.full_like(aimed, terms.label_smoothing - 1.0))
            if slope is not None:
                buffer.mul_(slope)
        return losses.squeeze(1), buffer

    def _scores(self, rows: Tensor, inner: Tensor | None, buffer: Tensor) -> Tensor | None:
        """Fill ``buffer`` with z, and give the derivative of the soft-capping."""
        self._multiply(rows, self._weight, buffer)
        if inner is not None and self._lora_B is not None:
            buffer.addmm_(inner, self._lora_B.t())
        if self._bias is not None:
            buffer += self._bias
        if self._terms.softcap is None:
            return None
        buffer.div_(self._terms.softcap).tanh_()
        slope = buffer.square().neg_().add_(1.0)
        buffer.mul_(self._terms.softcap)
        return slope

    def _multiply_blocks(self, rows: Tensor, _weight: Weight, out: Tensor) -> None:
        rows = rows.to(self._operand_dtype)
        for block in self._blocks():
            part = out[:, block.first : block.end]
            if rows.dtype == out.dtype:
                torch.mm(rows, block.weight.t(), out=part)
            else:
                part.copy_(rows @ block.weight.t())

    def back_to_hidden(self, error: Tensor) -> Tensor:
        """e Wₕ, [chunk, hidden]."""
        total = error.new_zeros(len(error), self._weight.shape[1])
        for block in self._blocks():
            part = error[:, block.first : block.end].to(self._operand_dtype)
            if part.dtype == total.dtype:
                total.addmm_(part, block.weight)
            else:
                total += part @ block.weight
        return total

    def add_weight_gradient(self, total: Tensor, error: Tensor, rows: Tensor) -> None:
        """Add eᵀ h to ``total``, [vocabulary, hidden]."""
        rows = rows.to(self._operand_dtype)
        step = len(total) if rows.dtype == total.dtype else _BLOCK
        for first in range(0, len(total), step):
            part = error[:, first : first + step].t().to(rows.dtype)
            if rows.dtype == total.dtype:
                total[first : first + step].addmm_(part, rows)
            else:
                total[first : first + step] += part @ rows
