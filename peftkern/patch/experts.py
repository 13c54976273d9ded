"""The experts of mixture-of-experts models, whose weights transformers packs into one parameter [experts, out, in]."""

from __future__ import annotations

from torch import nn


def holds_packed_experts(module: nn.Module) -> bool:
    """Whether ``module`` is called experts and holds their weights itself, as three-dimensional parameters."""
    has_stack = any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None)
    return has_stack and type(module).__name__.endswith("Experts")
