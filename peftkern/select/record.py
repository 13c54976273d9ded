"""What each tensor's gradient and each stretch of the error's path cost, in FLOPs, counted in the model itself.

One forward and one backward pass are watched (:mod:`peftkern.select.trace`), with fake tensors: they have shapes and no
numbers, so that nothing is computed and no memory is taken. A model that looks at numbers on its way (experts that are
chosen by their tokens, say) runs one real batch instead, and the log says so.

Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3.1, where costs come from formulas by the kind of
a tensor and the tensors form one chain.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.trace import Batch, Loss, Trace, left_alone, model_loss, trace

logger = logging.getLogger("peftkern")


def record(
    model: nn.Module, batch: Batch, *, candidates: Iterable[str] | None = None, loss: Loss | None = None
) -> CostGraph:
    """The costs of a training step of ``model`` on a batch of this shape, in FLOPs; a multiply-add counts 2.

    ``graph.step(S)`` is what a forward pass with exactly the tensors of S trained, and its backward pass, execute;
    :mod:`peftkern.select.flops` says what an operator counts. Sums into gradients that are there already, clipping and
    the optimizer are not in it. Autograd's structure is taken as it is: branches, residual connections, tied
    embeddings, an encoder beside a decoder, gradient checkpointing (not in the reentrant way), adapters and sparse
    deltas over frozen and quantized weights. The model is left as it was, the random number generators as well.

    Where a kernel is chosen by what asks for a gradient, the one that runs with all candidates trained is counted: T5's
    attention, whose learned bias decides, differs by up to 0.5% of a step. What ran for no token of the batch (experts)
    costs nothing. Under autocast, call it under the same autocast.

    The hook through which ``transformers`` and ``peft`` let the embeddings' output ask for a gradient is left out, as
    `Execution` takes it away. What else asks for one without being a parameter is paid by every step.

    Args:
        model: in the mode, dtype and state in which it is trained.
        batch: what ``model(**batch)`` takes.
        candidates: names of the parameters that can be trained; ``None``: those that require a gradient now. All others
            are frozen.
        loss: gives the loss of ``(model, batch)``; ``None``: ``model(**batch).loss``.

    Raises:
        ValueError: a candidate is no parameter of the model, or no floating-point one; there is none; the loss depends
            on none of them; or the model checkpoints in the reentrant way.
    """
    names = candidate_names(model, candidates)
    seen = _trace_fake(model, batch, names, loss or model_loss)
    return build_graph("flops", seen, seen.forward_flops, [charge.flops for charge in seen.charges])


def candidate_names(model: nn.Module, candidates: Iterable[str] | None) -> list[str]:
    """The names of ``candidates`` in the model's order; raises as `record` does."""
    parameters = dict(model.named_parameters())
    wanted = {n for n, p in parameters.items() if p.requires_grad} if candidates is None else set(candidates)
    unknown = sorted(wanted - parameters.keys())
    if unknown:
        raise ValueError(f"record: the model has no parameter {unknown[0]!r} (of tied ones the first name counts)")
    whole = [name for name in wanted if not parameters[name].is_floating_point()]
    if whole:
        raise ValueError(f"record: {whole[0]} is {parameters[whole[0]].dtype}, and has no gradient")
    if not wanted:
        raise ValueError("record: nothing requires a gradient; name the candidates")
    return [name for name in parameters if name in wanted]


def _trace_fake(model: nn.Module, batch: Batch, names: Sequence[str], loss: Loss) -> Trace:
    # the mode is not entered: what a model computes of masks and positions alone stays real, and so do its decisions
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with left_alone(model):
            _fake_parameters(model, mode)
            return trace(model, tree_map_only(Tensor, partial(_fake_numbers, mode), dict(batch)), names, loss)
    except Exception as error:  # whatever the model does with numbers that are not there
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    logger.warning("record: fake tensors cannot pass through this model (%s); one real batch runs instead", reason)
    with left_alone(model):
        return trace(model, batch, names, loss)


def _fake_parameters(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces them; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            # special ones hold more than numbers; with an activation that is fake they work as they are
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                fake = fakes.setdefault(id(parameter), mode.from_tensor(parameter))
                module._parameters[name] = fake  # type: ignore[assignment]


def _fake_numbers(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return mode.from_tensor(tensor) if tensor.is_floating_point() else tensor


# ---- from pieces of work to a graph


def build_graph(unit: str, seen: Trace, forward: float, costs: Sequence[float]) -> CostGraph:
    """The graph whose costs are ``costs``, one for each charge of ``seen``."""
    by_set: dict[int, float] = {}
    for charge, cost in zip(seen.charges, costs, strict=True):
        by_set[charge.tensors] = by_set.get(charge.tensors, 0.0) + cost
    everything = (1 << len(seen.names)) - 1
    always = [tensors for tensors in by_set if tensors & everything == everything or tensors >> len(seen.names)]
    forward += sum(by_set.pop(tensors) for tensors in always)
    rank = {index: position for position, index in enumerate(seen.order)}
    shared = [tensors for tensors in by_set if tensors & (tensors - 1)]
    first = {tensors: min(map(rank.__getitem__, _bits(tensors))) for tensors in shared}
    # a set that contains another has a first tensor no later than the other's
    shared.sort(key=lambda tensors: (first[tensors], -tensors.bit_count()))
    above: list[int] = []
    segments = []
    for position, tensors in enumerate(shared):
        needs, all_needed = _closest(tensors, shared[:position], above)
        above.append(all_needed)
        segments.append(Segment(by_set[tensors], needs, seen.names[seen.order[first[tensors]]]))
    tensor_costs = [
        TensorCost(seen.names[index], by_set.get(1 << index, 0.0), _closest(1 << index, shared, above)[0])
        for index in seen.order
    ]
    return CostGraph(unit, forward, tuple(segments), tuple(tensor_costs))


def _bits(tensors: int) -> list[int]:
    found = []
    while tensors:
        lowest = tensors & -tensors
        found.append(lowest.bit_length() - 1)
        tensors ^= lowest
    return found


def _closest(tensors: int, sets: Sequence[int], above: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The smallest of ``sets`` that contain ``tensors``, and the bit set of all that do.

    ``above[i]`` is the bit set of those that contain ``sets[i]``; these stand in front of it.
    """
    found: list[int] = []
    covered = 0
    left = (1 << len(sets)) - 1
    while left:
        position = left.bit_length() - 1
        if tensors & ~sets[position] == 0:
            found.append(position)
            covered |= above[position] | 1 << position
        left &= ~(covered | 1 << position)
    return tuple(reversed(found)), covered
