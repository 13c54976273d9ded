"""The shapes that are measured: groups of linear layers that share their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkern.tune.errors import TuneError

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same tensor, where all of them hang below one module."""


@dataclass(frozen=True)
class Group:
    """Linear layers that share x: the outputs of each, and the inputs of all."""

    outputs: tuple[int, ...]
    in_features: int

    @property
    def out_features(self) -> int:
        """Summed over the group."""
        return sum(self.outputs)

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.outputs))}x{self.in_features}"


LLAMA_3_8B = (
    Group((4096, 1024, 1024), 4096),
    Group((4096,), 4096),
    Group((14336, 14336), 4096),
    Group((4096,), 14336),
    Group((14336,), 4096),
    Group((1024,), 4096),
)
"""q/k/v, o, gate/up and down of Llama-3-8B; then up and k alone, as an adapter on some layers leaves them."""


def parse(text: str) -> Group:
    """A group from ``OUTxIN``, or ``OUT+OUT+OUTxIN`` for several layers.

    Raises:
        TuneError: the text is something else.
    """
    outputs, _, in_features = text.lower().partition("x")
    try:
        group = Group(tuple(int(output) for output in outputs.split("+")), int(in_features))
    except ValueError:
        group = Group((), 0)
    if not group.outputs or min(*group.outputs, group.in_features, 0) < 0 or 0 in (*group.outputs, group.in_features):
        raise TuneError(f"--shape must be OUTxIN or OUT+OUTxIN with positive numbers, got {text!r}")
    return group


def of_model(name: str) -> list[Group]:
    """The groups of a model of `transformers`, each once; only its configuration is read.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        TuneError: there is no such model, or it has no linear layers.
    """
    groups = list(dict.fromkeys(_groups(_empty_model(name))))
    if not groups:
        raise TuneError(f"MODEL: {name} has no linear layers besides its head")
    return groups


def _empty_model(name: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise TuneError(f"MODEL: the configuration of {name!r} cannot be read ({first_line})") from error


def _groups(model: Any) -> list[Group]:
    head = model.get_output_embeddings()
    found: list[Group] = []
    for parent in model.modules():
        layers = {name: layer for name, layer in parent.named_children() if isinstance(layer, nn.Linear)}
        single = {name: layer for name, layer in layers.items() if layer is not head}
        for names in _SIBLINGS:
            if all(name in single for name in names):
                members = [single.pop(name) for name in names]
                found.append(Group(tuple(layer.out_features for layer in members), members[0].in_features))
        found += [Group((layer.out_features,), layer.in_features) for layer in single.values()]
    return found
