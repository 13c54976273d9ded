"""Losses on pairs of a preferred and a rejected answer, without logits and without a second model.

    ℓθ(y)  = Σₜ log pθ(yₜ | x, y₍<t₎)           over the labelled tokens of a row
    L_DPO  = mean -log σ(β [ℓθ(y_w) - ℓref(y_w) - ℓθ(y_l) + ℓref(y_l)])
    L_ORPO = -Σ ℓθ(y_w) / Σ |y_w| + λ mean -log σ(log odds(y_w) - log odds(y_l))
             odds(y) = p / (1 - p),   p = exp(ℓθ(y) / |y|)

The mean is over pairs. The reference of DPO is the model itself with its adapters switched off. Hidden states go into
`peftkern.ops.label_logprobs`: no tensor of [tokens, vocabulary] exists at any time, and tokens without a label (the
prompt) cost no product in the head.

Source: Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; ORPO, Hong et al. 2024
(arXiv:2403.07691), eq. 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peftkern.ops.linear_cross_entropy import label_logprobs
from peftkern.patch.head import Head
from peftkern.patch.language_model import Tail, check_head, tail_of
from peftkern.patch.weights import NotFused, original_class

_IGNORED = -100


@dataclass(frozen=True)
class PreferenceLoss:
    """What a batch of pairs gives.

    Attributes:
        loss: without dimensions, to call ``backward`` on.
        chosen_rewards, rejected_rewards: [pairs], without gradient: of DPO β (ℓθ - ℓref), of ORPO λ ℓθ / |y|.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def token_logprobs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logarithm of the probability of every label, given the tokens in front of it; differentiable.

    Args:
        model: a causal language model of transformers, known to `peftkern.patch`, with adapters or without, patched or
            not, also in ``DistributedDataParallel``. FSDP, which shards the head, is not covered.
        batch: what the model takes, ``labels`` [rows, tokens] among it: the token's own id, or -100.

    Returns:
        [rows, tokens - 1] float32: at t the label of token t + 1; 0 where there is no label.

    Raises:
        ValueError: the model is none that is known, or its head is more than a linear layer with LoRA.
    """
    language_model, tail = _language_model(model)
    hidden = _hidden_states(model, language_model.get_submodule(tail.base), batch)[:, :-1]
    head = _head(language_model)  # behind the call, which unmerges adapters that are disabled
    softcap = language_model.config.final_logit_softcapping if tail.softcap else None
    labels = batch["labels"][:, 1:].to(hidden.device)
    if isinstance(head.weight, Tensor):
        hidden = hidden.to(head.weight.dtype)
    low_rank = head.low_rank(hidden)
    return label_logprobs(hidden, head.weight, labels, head.bias, softcap=softcap, low_rank=low_rank).float()


def _language_model(model: nn.Module) -> tuple[Any, Tail]:
    for module in model.modules():
        tail = tail_of(original_class(type(module)))
        if tail is not None:
            return module, tail
    raise ValueError(
        f"token_logprobs: {type(model).__name__} holds no causal language model that is known here; "
        "peftkern.patch.language_model.LANGUAGE_MODELS lists them"
    )


def _head(model: Any) -> Head:
    try:
        return check_head(model)
    except NotFused as refusal:
        raise ValueError(f"token_logprobs: {type(model).__name__} needs its logits: {refusal}") from refusal


def _hidden_states(model: Any, base: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What goes into the head, from a call of the whole model: what is wrapped around it runs as well."""
    found: list[Tensor] = []
    handle = base.register_forward_hook(lambda _module, _args, output: found.append(output.last_hidden_state))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    try:
        model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
    finally:
        handle.remove()
    return found[0]


def dpo_loss(
    model: nn.Module, batch: Mapping[str, Any], beta: float = 0.1, reference_logprobs: Tensor | None = None
) -> PreferenceLoss:
    """DPO's loss of a batch of pairs, and what the model has learned to prefer.

    Dropout of the model's own layers acts on the reference too, unless it is switched off; that of adapters does not.

    Args:
        model: as for `token_logprobs`.
        batch: with an even number of rows: all preferred answers, then the rejected ones in the same order. Labels of
            prompts and padding are -100.
        beta: β, how closely the policy stays to the reference.
        reference_logprobs: ℓref of every row, [rows]; ``None`` computes them with the adapters off.

    Raises:
        ValueError: as `token_logprobs`; the number of rows is odd; or there are neither adapters to switch off nor
            ``reference_logprobs``, or these are of another shape.
    """
    rows = _even_rows("dpo_loss", batch)
    if reference_logprobs is None:
        with torch.no_grad(), _adapters_off(model):
            reference_logprobs = token_logprobs(model, batch).sum(1)
    if tuple(reference_logprobs.shape) != (rows,):
        raise ValueError(f"dpo_loss: reference_logprobs must be [{rows}], got {list(reference_logprobs.shape)}")
    policy = token_logprobs(model, batch).sum(1)
    rewards = beta * (policy - reference_logprobs.to(policy.device))
    chosen, rejected = rewards.chunk(2)
    loss = -nn.functional.logsigmoid(chosen - rejected).mean()
    return PreferenceLoss(loss, chosen.detach(), rejected.detach())


def orpo_loss(model: nn.Module, batch: Mapping[str, Any], weight: float = 0.1) -> PreferenceLoss:
    """ORPO's loss of a batch of pairs: learns the preferred answers and needs no reference.

    Args:
        model: as for `token_logprobs`.
        batch: as for `dpo_loss`; every row has a label.
        weight: λ, of the part that tells the answers apart.

    Raises:
        ValueError: as `token_logprobs`, the number of rows is odd, or a row has no label.
    """
    rows = _even_rows("orpo_loss", batch)
    counts = (batch["labels"][:, 1:] != _IGNORED).sum(1)
    if not bool(counts.all()):
        raise ValueError(
            f"orpo_loss: every row needs a label; rows {(counts == 0).nonzero().flatten().tolist()} have none"
        )
    logprobs = token_logprobs(model, batch).sum(1)
    counts = counts.to(logprobs.device)
    means = logprobs / counts
    # log(1 - p), also where p is next to 1
    chosen, rejected = (means - torch.log(-torch.expm1(means))).chunk(2)
    learned = -logprobs[: rows // 2].sum() / counts[: rows // 2].sum()
    loss = learned - weight * nn.functional.logsigmoid(chosen - rejected).mean()
    return PreferenceLoss(loss, *(weight * means.detach()).chunk(2))


def _even_rows(caller: str, batch: Mapping[str, Any]) -> int:
    rows = int(batch["labels"].shape[0])
    if rows % 2 or rows == 0:
        raise ValueError(f"{caller}: the batch must hold the preferred answers, then as many rejected; got {rows} rows")
    return rows


def _adapters_off(model: nn.Module) -> AbstractContextManager[Any]:
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module.disable_adapter()  # type: ignore[no-any-return]
    raise ValueError(
        f"dpo_loss: {type(model).__name__} has no adapters of PEFT to switch off; give reference_logprobs, computed "
        "with token_logprobs before training"
    )
