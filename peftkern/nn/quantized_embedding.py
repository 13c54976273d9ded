"""An embedding whose frozen weight stays quantized; the rows that are looked up are decoded, and no others.

y = dequantize(W[tokens])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor, nn

from peftkern.formats import QuantizedTensor
from peftkern.nn.quantized_linear import QuantizedLinear
from peftkern.nn.quantized_module import QuantizedModule
from peftkern.ops.dequantize import dequantize
from peftkern.ops.quantize import quantize


def quantized_class(module: nn.Module) -> type[QuantizedModule]:
    """The class that a linear layer or an embedding gets when its weight is quantized."""
    return QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """``nn.Embedding`` with a frozen quantized weight, [num_embeddings, embedding_dim].

    It gives the dtype of the weight that was quantized or, behind a cast of the module, the one that it was cast to.
    """

    sides: ClassVar[tuple[str, str]] = ("num_embeddings", "embedding_dim")
    dense_class: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(self, quantized: QuantizedTensor, padding_idx: int | None = None) -> None:
        """Takes over ``quantized``, [num_embeddings, embedding_dim], without a copy.

        Args:
            quantized: in a format and size whose rows can be decoded alone: int8, or rows of whole blocks.
            padding_idx: as in ``nn.Embedding``, which leaves its row out of the gradient. Here no row has one.

        Raises:
            ValueError: ``quantized`` is no matrix, not consistent, or its rows share blocks.
        """
        nn.Module.__init__(self)
        self.check(quantized)
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self._install(quantized)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, format: str = "int8", block_size: int = 64, double_quant: bool = False
    ) -> QuantizedEmbedding:
        """A quantized copy of ``embedding``.

        Raises:
            ValueError: ``embedding`` changes its weight on look-ups (``max_norm``), rows share blocks, or as
                :func:`peftkern.ops.quantize` does.
            TypeError: as that does.
        """
        if embedding.max_norm is not None:
            raise ValueError(
                f"QuantizedEmbedding: max_norm must be None, got {embedding.max_norm}; it changes the weight"
            )
        quantized = quantize(embedding.weight.detach(), format, block_size, double_quant)
        return cls(quantized, embedding.padding_idx).train(embedding.training)

    @classmethod
    def check(cls, quantized: QuantizedTensor) -> None:
        super().check(quantized)
        if not quantized.has_own_rows:
            raise ValueError(
                f"QuantizedEmbedding: rows of {quantized.shape[1]} share blocks of {quantized.block_size} and are not "
                "decoded alone; take int8, or a block size that divides them"
            )

    def forward(self, input: Tensor) -> Tensor:
        rows = dequantize(self.quantized.take(input.reshape(-1)))
        return rows.view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = fn(self.weight.detach().new_empty(0, dtype=self.weight_dtype)).dtype
        super()._apply(fn, recurse)
        if dtype != self.weight_dtype:
            self.weight_dtype, self._view = dtype, None
        return self
