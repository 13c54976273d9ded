"""A linear layer whose weight counts only where a mask keeps it: y = x (W ⊙ M)ᵀ + b.

The layer stays the object it is, with its weight, bias and hooks; only its class changes, and the mask sits in a child
module:

    layer.weight_mask.bits        one bit for each entry, beside the layer's own state in its state dict

What the weight holds where the mask does not keep it stays there and never matters; a weight that is trained gets a
gradient of zero there. `peftkern.sparse.mask_layers` puts masks on the layers of a model.

Source: SPDF, Thangarasa et al. 2023 (arXiv:2303.10464); DSEE, Chen et al. 2021 (arXiv:2111.00160).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from peftkern.formats import FOUR_BIT_FORMATS, BitMask, QuantizedTensor, codebook
from peftkern.nn.quantized_linear import QuantizedLinear
from peftkern.ops.lora_linear import Weight
from peftkern.ops.masked_linear import masked_linear


class WeightMask(nn.Module):
    """The mask of a weight, as a part of its layer.

    Attributes:
        bits: buffer [out, ⌈in / 8⌉] uint8, as in `BitMask`. Casts of the module leave it as it is.
    """

    bits: Tensor

    def __init__(self, mask: BitMask) -> None:
        """Takes over the bits of ``mask`` without a copy.

        Raises:
            ValueError: ``mask`` is inconsistent.
        """
        super().__init__()
        mask.validate()
        self.shape, self.pattern = torch.Size(mask.shape), mask.pattern
        self.register_buffer("bits", mask.bits)

    @property
    def mask(self) -> BitMask:
        """The mask; it shares the memory of the buffer."""
        return BitMask(self.bits, self.shape, self.pattern)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        loaded = state_dict.get(f"{prefix}bits")
        if loaded is not None and not torch.equal(loaded.to(self.bits.device), self.bits):
            self.pattern = None  # what was known of the old mask need not hold for the new one
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, pattern={self.pattern}"


class _Masked(nn.Module):
    """What masked layers share, whatever holds their weight."""

    weight_mask: WeightMask

    def __init__(self, *_arguments: Any) -> None:
        raise TypeError(f"{type(self).__name__}: make one of an existing layer: mask_(layer, mask)")

    def forward(self, input: Tensor) -> Tensor:
        return masked_linear(input, masked_weight(self), self.weight_mask.mask, bias=self._parameters["bias"])


class MaskedLinear(_Masked, nn.Linear):
    """``nn.Linear`` whose weight, trained or frozen, counts where ``weight_mask`` keeps it."""


class MaskedQuantizedLinear(_Masked, QuantizedLinear):
    """`QuantizedLinear` whose weight counts where ``weight_mask`` keeps it."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, [out, in], zero where the mask does not keep it."""
        return super().dequantize(dtype).masked_fill_(~self.weight_mask.mask.mask(), 0.0)

    def dequantize_(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Turn the module, itself, into a `MaskedLinear`, whose weight stays frozen."""
        dense: nn.Linear = super().dequantize_(dtype)
        dense.__class__ = MaskedLinear
        return dense

    def merge_(self, delta: Tensor) -> NoReturn:
        """Refused: the mask would act on ``delta`` as well.

        Raises:
            ValueError: always.
        """
        raise ValueError(MERGE_UNDER_MASK)


MERGE_UNDER_MASK = (
    "merge: the weight is under a mask, which would act on what is merged into it as well; write its zeros into the "
    "weight first: peftkern.sparse.release_masks(model, keep_zeros=True)"
)

_MASKED: dict[type, type] = {nn.Linear: MaskedLinear, QuantizedLinear: MaskedQuantizedLinear}
_UNDER: dict[type, type] = {masked: plain for plain, masked in _MASKED.items()}


def masked_class(plain: type) -> type | None:
    """The class of a masked layer that was of class ``plain``; ``None`` where there is none."""
    return _MASKED.get(plain)


def under_mask(layer_class: type) -> type:
    """The class that a masked layer had before; any other class is its own."""
    return _UNDER.get(layer_class, layer_class)


def mask_of(layer: nn.Module) -> BitMask | None:
    """The mask over the weight of ``layer``; ``None`` where it has none."""
    holder = layer._modules.get("weight_mask")
    return holder.mask if isinstance(holder, WeightMask) else None


def masked_weight(layer: Any) -> Weight:
    """What the mask of ``layer`` acts on: the weight as it is stored, [out, in]."""
    weight: Weight = layer.quantized if isinstance(layer, QuantizedLinear) else layer.weight
    return weight


def mask_(layer: nn.Linear, mask: BitMask) -> nn.Linear:
    """Put ``mask`` over the weight of ``layer``, itself. Its bits are taken over without a copy.

    Args:
        layer: an ``nn.Linear`` or a `QuantizedLinear`, no subclass of them.
        mask: of the shape of the weight, on its device.

    Raises:
        TypeError: ``layer`` is of another class.
        ValueError: shape or device of ``mask`` do not fit, or it is inconsistent.
    """
    masked = masked_class(type(layer))
    if masked is None:
        raise TypeError(f"mask_: layer must be an nn.Linear or a QuantizedLinear, got {type(layer).__name__}")
    check_mask("mask_", layer, mask)
    layer.weight_mask = WeightMask(mask)
    layer.__class__ = masked
    return layer


def check_mask(caller: str, layer: nn.Linear, mask: BitMask) -> None:
    """Raise `ValueError` unless ``mask`` is consistent, of the shape of the weight of ``layer`` and on its device."""
    mask.validate()
    shape, device = (layer.out_features, layer.in_features), layer.weight.device
    if tuple(mask.shape) != shape:
        raise ValueError(f"{caller}: mask must be [out, in] = {list(shape)}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{caller}: the weight is on {device} and mask on {mask.device}; move one of them")


def release_(layer: nn.Linear, *, keep_zeros: bool = False) -> nn.Linear:
    """Take the mask off ``layer``, itself, which is then of the class that it had before.

    Args:
        layer: a masked one.
        keep_zeros: write zeros where the mask did not keep the weight, so that the layer computes what it did; each
            quantized format has a code for zero, and no other value changes. Without it the weight is as it was before
            it was masked, or as training left it.

    Raises:
        TypeError: ``layer`` has no mask.
    """
    if type(layer) not in _UNDER:
        raise TypeError(f"release_: layer must be a masked one, got {type(layer).__name__}")
    if keep_zeros:
        write_zeros_(layer)
    del layer.weight_mask
    layer.__class__ = under_mask(type(layer))
    return layer


@torch.no_grad()
def write_zeros_(layer: nn.Linear) -> None:
    """Set the weight of a masked layer to zero where its mask does not keep it."""
    mask = mask_of(layer)
    assert mask is not None
    if isinstance(layer, QuantizedLinear):
        layer.replace_(_with_zeros(layer.quantized, mask))
    else:
        layer.weight.masked_fill_(~mask.mask(), 0.0)


def _with_zeros(weight: QuantizedTensor, mask: BitMask) -> QuantizedTensor:
    """``weight`` with the code of zero where ``mask`` does not keep it; scales as they are."""
    dropped = ~mask.mask().flatten()
    codes = weight.packed.flatten()
    if weight.format not in FOUR_BIT_FORMATS:
        return replace(weight, packed=codes.masked_fill(dropped, _zero_code(weight.format)).view_as(weight.packed))
    zero = _zero_code(weight.format)
    halves = nn.functional.pad(dropped, (0, dropped.numel() % 2)).view(-1, 2)  # the even element in the high nibble
    high = torch.where(halves[:, 0], zero << 4, codes & 0xF0)
    low = torch.where(halves[:, 1], zero, codes & 0x0F)
    return replace(weight, packed=(high | low).to(codes.dtype).view_as(weight.packed))


def _zero_code(format: str) -> int:
    return 0 if format == "int8" else int((codebook(format) == 0).nonzero()[0])
