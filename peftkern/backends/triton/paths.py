"""The ways to compute a product; :mod:`crossover` picks one."""

from __future__ import annotations

from enum import StrEnum


class Path(StrEnum):
    """A way to compute a product.

    * ``FEW``: one kernel reads the codes, decodes them and computes the adapters' part; K is split, and the partial
      sums are added in a fixed order. Up to 64 tokens.
    * ``FUSED``: the codes are decoded inside the product. Weights that need decoding alone.
    * ``STAGED``: one launch decodes all members into the scratch buffer, then our product runs on that; on dense
      weights, our product runs on the weights as they lie.
    * ``VENDOR``: the same scratch buffer (or the dense weights); the adapters' part is written to the result first, and
      the vendor's product is added to it.
    """

    FEW = "few"
    FUSED = "fused"
    STAGED = "staged"
    VENDOR = "vendor"


FEW_TOKENS = 64
"""The greatest number of tokens that ``Path.FEW`` takes."""
