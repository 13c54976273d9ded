"""Lower learning rates for lower layers, and top layers that begin anew.

    lr_l = lr ξ^(L - l)         l = 0 for embeddings, 1 to L for the blocks; all above the blocks has lr

Source: ULMFiT, Howard and Ruder 2018 (arXiv:1801.06146), section 3.2; ELECTRA, Clark et al. 2020 (arXiv:2003.10555);
re-initialisation: Revisiting Few-sample BERT Fine-tuning, Zhang et al. 2021 (arXiv:2006.05987), section 5.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from peftkern.select.presets import below_blocks, block_indices, find_blocks


def layer_decay_groups(model: nn.Module, lr: float, decay: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one for each layer, with its learning rate; the lowest layer first.

    An optimizer of these groups works with every scheduler, which scales the rate of each group, and its state holds
    them. With the Trainer: ``Trainer(..., optimizers=(AdamW(layer_decay_groups(model, ...)), None))``.

    Args:
        model: the groups hold its parameters that require a gradient. An encoder and a decoder each count their own
            blocks.
        lr: of everything above the blocks, and of the highest block.
        decay: ξ, above 0 and at most 1; 0.8 to 0.95 are usual.
        weight_decay: of matrices; biases and norms, which have one dimension, have none.

    Raises:
        ValueError: ``decay`` is none of these, or no parameter requires a gradient.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay_groups: decay must be above 0 and at most 1, got {decay}")
    distances = _distances_from_the_top(model)
    groups = defaultdict[tuple[int, bool], list[nn.Parameter]](list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[distances[name], parameter.dim() > 1].append(parameter)
    if not groups:
        raise ValueError("layer_decay_groups: no parameter of the model requires a gradient")
    return [
        {"params": parameters, "lr": lr * decay**distance, "weight_decay": weight_decay if is_matrix else 0.0}
        for (distance, is_matrix), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]


def _distances_from_the_top(model: nn.Module) -> dict[str, int]:
    """``L - l`` of every parameter."""
    blocks = find_blocks(model)
    stacks = [block.rpartition(".")[0] for block in blocks]
    above = [stacks[index + 1 :].count(stack) for index, stack in enumerate(stacks)]
    below, most = below_blocks(model), max((stacks.count(stack) for stack in stacks), default=0)
    indices = block_indices(model, (name for name, _ in model.named_parameters()))
    return {
        name: above[index] if index is not None else (most if name in below else 0) for name, index in indices.items()
    }


def reinit_top(model: nn.Module, layers: int, seed: int = 0) -> tuple[str, ...]:
    """Give the highest ``layers`` blocks new random weights, as the model's own initialisation makes them.

    Args:
        seed: the same seed gives the same weights; random numbers elsewhere are not touched.

    Returns:
        The names of the parameters that are new.

    Raises:
        ValueError: there are fewer blocks.
        TypeError: the model does not say how its weights are initialised: it is none of transformers'.
    """
    blocks = find_blocks(model)
    if not 1 <= layers <= len(blocks):
        raise ValueError(f"reinit_top: layers must be from 1 to {len(blocks)}, the model's blocks; got {layers}")
    initialise: Any = getattr(model, "_init_weights", None)
    if initialise is None:
        raise TypeError(f"reinit_top: {type(model).__name__} has no _init_weights, which says how weights begin")
    chosen = blocks[len(blocks) - layers :]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for block in chosen:
            for module in model.get_submodule(block).modules():
                _forget_initialised(module)
                initialise(module)
    return tuple(
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"{block}." for block in chosen))
    )


def _forget_initialised(module: nn.Module) -> None:
    """transformers leaves alone what is marked as loaded."""
    for holder in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
        if hasattr(holder, "_is_hf_initialized"):
            del holder._is_hf_initialized
