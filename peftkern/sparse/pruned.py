"""What pruning has taken from a model, to save beside what was trained over the rest: masks, and heads that went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peftkern.formats import BitMask
from peftkern.integrations.fingerprint import Fingerprint, WrongBaseError, base_of, difference_to_base, unwrapped
from peftkern.patch.table import format_table, pattern_of
from peftkern.sparse.head_pruning import remove_heads
from peftkern.sparse.masking import mask_layers

FILE = "pruned.safetensors"


@dataclass(frozen=True, eq=False)
class Pruned:
    """What was pruned. ``str()`` is a table.

    Attributes:
        masks: by name of a layer in the model without PEFT's wrapper, over its base weight.
        heads: by name of an attention there, the groups of heads that stayed, as `remove_heads` takes them.
        base: of the model that it was taken from.
    """

    masks: Mapping[str, BitMask]
    heads: Mapping[str, tuple[int, ...]]
    base: Fingerprint

    def apply_to(self, model: nn.Module) -> None:
        """Prune ``model`` alike: before deltas that were saved afterwards, and adapters, are put on it.

        Raises:
            WrongBaseError: ``model`` is another one.
            ValueError, TypeError: as `remove_heads` and `mask_layers` raise them.
        """
        difference = difference_to_base(self.base, model)
        if difference is not None:
            raise WrongBaseError(
                f"what was pruned is of {self.base.model!r}, and the model is {base_of(model).model!r}: {difference}"
            )
        whole = unwrapped(model)
        if self.heads:
            remove_heads(whole, self.heads)
        if self.masks:
            mask_layers(whole, self.masks)

    def save(self, folder: str | Path) -> None:
        """Write ``pruned.safetensors`` to ``folder``: a bit for each entry of a mask.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "masks": {name: {"shape": list(mask.shape), "pattern": mask.pattern} for name, mask in self.masks.items()},
            "heads": self.heads,
            "base": self.base.to_dict(),
        }
        tensors = {name: mask.bits.cpu().contiguous() for name, mask in self.masks.items()}
        safetensors.torch.save_file(tensors, folder / FILE, {"pruned": json.dumps(description)})

    @classmethod
    def load(cls, folder: str | Path) -> Pruned:
        """What `save` has written to ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is torn, or is not what it says that it is.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(f"Pruned.load: there is no {path}")
        try:
            with safe_open(path, "pt") as file:
                description = json.loads(file.metadata()["pruned"])
                masks = {
                    name: BitMask(
                        file.get_tensor(name), torch.Size(one["shape"]), one["pattern"] and tuple(one["pattern"])
                    )
                    for name, one in description["masks"].items()
                }
            heads = {name: tuple(groups) for name, groups in description["heads"].items()}
            base = Fingerprint.from_dict(description["base"])
            for mask in masks.values():
                mask.validate()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Pruned.load: {path} cannot be read ({type(error).__name__}: {error})") from None
        return cls(masks, heads, base)

    def __str__(self) -> str:
        kept: dict[str, list[int]] = {}
        for name, mask in self.masks.items():
            row = kept.setdefault(pattern_of(name), [0, 0])
            row[0] += mask.kept()
            row[1] += mask.shape.numel()
        lines = [[name, f"{some:,} of {all_:,}", f"{some / all_:.1%}"] for name, (some, all_) in kept.items()]
        lines += [[name, f"heads {', '.join(map(str, groups))}", ""] for name, groups in self.heads.items()]
        return format_table(["pruned", "kept", "density"], lines)
