"""Skill grafting: which few of the changes that fine-tuning has made carry the skill.

    θ(γ) = θ0 + γ ⊙ τ            τ = θt - θ0            γ = γ0 + (1 - 2 γ0) σ(S - b)

γ0 is 1 at the K entries of the largest |τ|. S is learned, no entry of θ is: with f = σ(S - b),

    ∂L/∂S = ∂L/∂θ ⊙ τ ⊙ (1 - 2 γ0) ⊙ f (1 - f)

∂L/∂θ ⊙ τ is summed while gradients arrive, entry by entry, and no gradient is kept. After every epoch γ is rounded: an
entry is where γ0 has it unless S > b, and elsewhere if S > b. The best rounded γ is the graft.

Only candidates have an S, the entries of the largest |τ|: with b = 10 another one would act with 5e-5 of its τ, and
its S would hardly move. In linear layers the candidates are sparse deltas over θ0, so that their gradient is formed
for them alone, over a quantized weight too.

Source: Task-Specific Skill Localization in Fine-tuned Language Models, Panigrahi et al. 2023 (arXiv:2302.06600),
section 3. The published code takes entries strictly above a threshold, one fewer than asked for, and saves S, which
says nothing without γ0; here exactly K are taken, and the graft itself is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkern.formats import SparseIndices
from peftkern.formats.bit_mask import kept_count
from peftkern.integrations.fingerprint import Fingerprint, base_parameters, forget_base, remember_base, unwrapped
from peftkern.integrations.selection import head_ids
from peftkern.nn.sparse_linear import SparseDelta
from peftkern.ops.importance import accumulate_importance_
from peftkern.ops.select_top import select_top
from peftkern.select.method import Method, logger
from peftkern.sparse.applied import Applied, Change, changes_of, check_names, read_parameters
from peftkern.sparse.layers import attach, detach, weight_shape
from peftkern.sparse.update import SparseUpdate
from peftkern.sparse.update_file import Entries

NAME = "skill_grafting"
"""Of the deltas while S is learned, and of the module that holds S."""

Reference = nn.Module | Mapping[str, Tensor] | SparseUpdate


# ---- the task vector at the candidates


@dataclass(frozen=True)
class _Task:
    """The candidates.

    Attributes:
        entries: by name of a parameter, their positions and τ in float32.
        tuned: by name, the same entries of the fine-tuned model, bit for bit; empty where only τ is known.
        patch: [candidates] bool, γ0, in the order of ``entries``.
        size: of how many entries the candidates are the largest.
    """

    entries: dict[str, Entries]
    tuned: dict[str, Tensor]
    patch: Tensor
    size: int

    @property
    def tau(self) -> Tensor:
        """[candidates] float32."""
        return torch.cat([one.values for one in self.entries.values()])


def _considered(model: nn.Module, embeddings: bool, heads: bool, dense: Iterable[str]) -> dict[str, int]:
    """Names of the parameters that a graft may change, each once, and how many entries they have."""
    left_out = set() if heads else head_ids(model)
    modules = [m for m in model.modules() if id(m) in left_out or (isinstance(m, nn.Embedding) and not embeddings)]
    parameters = base_parameters(model)
    check_names("SkillGrafting: dense", dense, parameters)
    seen = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    seen |= {id(parameters[name]) for name in dense}
    sizes = {}
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            sizes[name] = _size(model, name, parameter)
    return sizes


def _size(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    module, _, own = name.rpartition(".")
    shape = weight_shape(model.get_submodule(module)) if own == "weight" else None  # a packed weight has another one
    return parameter.numel() if shape is None else math.prod(shape)


def _count(what: str, share: float, size: int) -> int:
    count = kept_count(size, share)
    if count == 0:
        raise ValueError(f"SkillGrafting: {what}={share} of {size} entries is less than one; raise {what}")
    return count


def _largest(entries: Mapping[str, Entries], count: int) -> dict[str, Tensor]:
    """[entries] bool by name: exactly the ``count`` of the largest |τ| of all; of equal ones the first."""
    chosen = select_top([one.values for one in entries.values()], count)
    masks = {}
    for (name, one), places in zip(entries.items(), chosen, strict=True):
        masks[name] = torch.zeros(len(one.values), dtype=torch.bool, device=one.values.device)
        masks[name][places] = True
    return masks


def _subset(one: Entries, mask: Tensor) -> Entries:
    return Entries(one.shape, one.flat[mask], one.values[mask])


def _differing(differing: int, wanted: int) -> None:
    if differing < wanted:
        raise ValueError(
            f"SkillGrafting: density asks for {wanted} entries, and fine-tuning has changed {differing} of those that "
            "a graft may change; lower density"
        )


def _task_from_base(
    base: Mapping[str, Tensor], model: nn.Module, sizes: Mapping[str, int], density: float, share: float
) -> _Task:
    """The candidates of a fine-tuned ``model``; ``base`` has been checked."""
    parameters = base_parameters(model)
    tuned = {name: parameters[name].detach() for name in sizes}
    before = {name: base[name].detach().to(tuned[name].device) for name in sizes}
    size = sum(sizes.values())
    wanted = _count("density", density, size)
    differing = sum(int((tuned[name] != before[name]).sum()) for name in sizes)
    _differing(differing, wanted)
    count = min(_count("candidates", share, size), differing)
    places = select_top(list(tuned.values()), count, score="difference", other=list(before.values()))
    entries, bits = {}, {}
    for (name, tensor), flat in zip(tuned.items(), places, strict=True):
        if len(flat):
            bits[name] = tensor.reshape(-1)[flat]
            entries[name] = Entries(tensor.shape, flat, bits[name].float() - before[name].reshape(-1)[flat].float())
    return _finite(_Task(entries, bits, torch.cat(list(_largest(entries, wanted).values())), size))


def _task_from_update(
    update: SparseUpdate, model: nn.Module, sizes: Mapping[str, int], density: float, share: float
) -> _Task:
    """The candidates of an ``update`` of ``model``."""
    parameters = base_parameters(model)
    check_names("the update", update.entries, parameters)
    ids = {id(parameters[name]) for name in sizes}
    size = sum(sizes.values())
    wanted = _count("density", density, size)
    entries: dict[str, Entries] = {}
    for name, one in update.entries.items():
        if id(parameters[name]) in ids:
            device = parameters[name].device
            folded = Entries(one.shape, one.flat.to(device), (update.scaling * one.values.float()).to(device))
            entries[name] = _subset(folded, folded.values != 0)
    differing = sum(len(one.flat) for one in entries.values())
    _differing(differing, wanted)
    masks = _largest(entries, min(_count("candidates", share, size), differing))
    entries = {name: _subset(one, masks[name]) for name, one in entries.items() if bool(masks[name].any())}
    return _finite(_Task(entries, {}, torch.cat(list(_largest(entries, wanted).values())), size))


def _finite(task: _Task) -> _Task:
    if not bool(task.tau.isfinite().all()):
        raise ValueError("SkillGrafting: fine-tuning has changed the model by something that is not finite")
    return task


def _check_base(base: Mapping[str, Tensor], model: nn.Module) -> None:
    seen: set[int] = set()
    for name, parameter in base_parameters(model).items():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        other = base.get(name)
        if not parameter.is_floating_point():
            raise ValueError(
                f"SkillGrafting: {name} of the fine-tuned model is quantized ({parameter.dtype}); prepare the base "
                "model, and give what was trained over it as a SparseUpdate"
            )
        if other is None or other.shape != parameter.shape or other.dtype != parameter.dtype:
            found = "is missing there" if other is None else f"is {list(other.shape)} {other.dtype} there"
            raise ValueError(
                f"SkillGrafting: {name} must be in the base as {list(parameter.shape)} {parameter.dtype}, and {found}"
            )


# ---- what is learned


class _Learned(nn.Module):
    """S and what belongs to it, as buffers, so that checkpoints of the model hold them."""

    scores: Tensor
    total: Tensor
    summed: Tensor
    graft: Tensor
    metric: Tensor
    unrated: Tensor

    def __init__(self, patch: Tensor, seed: int) -> None:
        """``patch``: γ0, [candidates] bool."""
        super().__init__()
        drawn = torch.rand(len(patch), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("scores", drawn.to(patch.device))  # S, float32: a step may be 1e7 times a gradient
        self.register_buffer("total", torch.zeros_like(self.scores))  # Σ ∂L/∂θ ⊙ τ since S last moved
        self.register_buffer("summed", torch.tensor(0))  # updates that are in the total
        self.register_buffer("graft", patch.clone())  # the best γ so far
        self.register_buffer("metric", torch.tensor(-math.inf, dtype=torch.float64))  # of it
        self.register_buffer("unrated", torch.tensor(1))  # updates since γ was last rounded, or that it never was


@dataclass(frozen=True)
class _Place:
    """The candidates of one parameter: where they are among all, and what holds them while S is learned."""

    name: str
    span: slice
    flat: Tensor
    parameter: nn.Parameter
    delta: SparseDelta | None
    before: Tensor | None

    @torch.no_grad()
    def set(self, change: Tensor) -> None:
        """Let ``change``, γ ⊙ τ of all candidates, act."""
        if self.before is None:
            self.parameter.copy_(change[self.span])
        else:
            self.write((self.before.float() + change[self.span]).to(self.parameter.dtype))

    @torch.no_grad()
    def write(self, numbers: Tensor) -> None:
        """Write [entries] into the parameter."""
        self.parameter[torch.unravel_index(self.flat, self.parameter.shape)] = numbers

    def gradient(self) -> Tensor:
        """Of the entries."""
        gradient = self.parameter.grad
        assert gradient is not None
        return gradient if self.before is None else gradient.reshape(-1)[self.flat]


# ---- the method


class SkillGrafting(Method):
    """Find the entries of a fine-tuned model that its skill sits in.

        method = SkillGrafting(base, density=1e-4, metric=accuracy)
        method.prepare(fine_tuned)                          # is the base now, with candidates over it
        method.start(torch.optim.SGD(method.parameters(), lr=0.0))
        for _ in range(epochs):
            for batch in batches:
                method.step(fine_tuned, batch)
            method.end_epoch()
        method.finish()                                     # is the base with the graft in it
        method.result.save("graft")

    S takes the steps, by stochastic gradient descent with ``lr``. The optimizer that a Trainer or a loop brings finds
    no gradient and changes nothing, whatever its kind, learning rate, weight decay or clipping. A Trainer ends the
    epochs by itself, and its checkpoints hold S.

    Parameters that a graft may not change are those of the base in the end. A new head has no base worth the name:
    name it in ``dense``, and it stays as it was tuned.

    Args:
        reference: what the fine-tuned model is compared with: the base model or its state dict; then `prepare` takes
            the fine-tuned model, dense and of the same dtypes. Or the update itself; then `prepare` takes the base
            model, dense or quantized.
        density: K of the base patch γ0, as a share of the entries that a graft may change.
        candidates: how many entries have an S, as a share of the same; no more than those that differ.
        lr: of S. The published value suits τ and gradients of a large model that is tuned gently.
        shift: b. S begins evenly between 0 and 1, so that σ(S - b) is small.
        accumulation: updates whose gradients are averaged for a step of S; the last of an epoch may have fewer.
        embeddings: whether a graft may change embeddings.
        heads: whether it may change output embeddings and other heads.
        dense: names of parameters that stay as they were tuned.
        metric: of a model, higher is better; the best epoch's graft is kept. ``None``: the last one's.
        seed: of the first S.

    Attributes:
        result: the graft as an update of the base, after `finish`. Its values are τ, in float32.
        applied: the graft in the model, after `finish`; ``applied.revert()`` leaves the base. Where the reference was
            an update, it consists of sparse deltas; otherwise the weights hold the tuned numbers, bit for bit.
        candidates_found: how many entries have an S, after `prepare`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        reference: Reference,
        density: float = 1e-5,
        candidates: float = 1e-3,
        lr: float = 1e7,
        shift: float = 10.0,
        accumulation: int = 1,
        embeddings: bool = False,
        heads: bool = False,
        dense: Sequence[str] = (),
        metric: Callable[[nn.Module], float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < density <= candidates <= 1:
            raise ValueError(
                f"SkillGrafting: density and candidates must be 0 < density <= candidates <= 1, "
                f"got {density} and {candidates}"
            )
        if not 0 < lr < math.inf:
            raise ValueError(f"SkillGrafting: lr must be greater than 0 and finite, got {lr}")
        if accumulation < 1:
            raise ValueError(f"SkillGrafting: accumulation must be at least 1, got {accumulation}")
        self.reference = reference
        self.density, self.candidates = density, candidates
        self.lr, self.shift, self.accumulation = lr, shift, accumulation
        self.embeddings, self.heads, self.dense = embeddings, heads, tuple(dense)
        self.metric, self.seed = metric, seed
        self.result: SparseUpdate | None = None
        self.applied: Applied | None = None
        self.candidates_found = 0
        self._task: _Task | None = None
        self._base: Fingerprint | None = None
        self._places: list[_Place] = []
        self._dense_changes: list[Change] = []
        self._hooks: list[RemovableHandle] = []
        self._asked: dict[str, bool] = {}

    # ---- preparing

    def prepare(self, model: nn.Module) -> None:
        """Make ``model`` the base with candidates over it.

        Raises:
            RuntimeError: this object has prepared another model, or has finished.
            ValueError: the model carries PEFT adapters; it does not fit the reference; a share comes to no entry; fewer
                entries differ than ``density`` asks for; or a layer cannot carry a delta.
            TypeError: a parameter that a graft may change is float64.
        """
        if self.result is not None:
            raise RuntimeError("SkillGrafting: has finished; make a new object for another graft")
        super().prepare(model)
        if self._task is not None:
            return
        try:
            self._prepare(model)
        except (ValueError, TypeError):
            self.model = None
            raise

    def _prepare(self, model: nn.Module) -> None:
        if unwrapped(model) is not model:
            raise ValueError("SkillGrafting: the model carries PEFT adapters; call merge_and_unload() first")
        sizes = _considered(model, self.embeddings, self.heads, self.dense)
        asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        if isinstance(self.reference, SparseUpdate):
            task, attached = self._put_update(self.reference, model, sizes)
        else:
            task, attached = self._put_base(self.reference, model, sizes)
        self._asked = asked
        self._task = task
        self._base = self.reference.base if isinstance(self.reference, SparseUpdate) else Fingerprint.of(model)
        self._places = _make_places(model, task, attached)
        self.candidates_found = len(task.patch)
        model.add_module(NAME, _Learned(task.patch, self.seed))
        model.requires_grad_(False)
        for place in self._places:
            place.parameter.requires_grad_(True)
            hook: RemovableHandle = place.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._collector(place)
            )
            self._hooks.append(hook)
        logger.info("skill grafting: %d candidates of %d entries, seed %d", len(task.patch), task.size, self.seed)

    def _put_update(
        self, update: SparseUpdate, model: nn.Module, sizes: Mapping[str, int]
    ) -> tuple[_Task, dict[str, SparseDelta]]:
        if self.dense:
            raise ValueError("SkillGrafting: dense is what the update holds dense; leave the argument out")
        update.check_base(model)
        task = _task_from_update(update, model, sizes, self.density, self.candidates)
        changes = changes_of(model, {}, update.dense, 1.0)
        attached = _attach(model, task)
        for change in changes:
            change.apply()
        self._dense_changes = changes
        return task, attached

    @torch.no_grad()
    def _put_base(
        self, reference: nn.Module | Mapping[str, Tensor], model: nn.Module, sizes: Mapping[str, int]
    ) -> tuple[_Task, dict[str, SparseDelta]]:
        base = base_parameters(reference) if isinstance(reference, nn.Module) else reference
        _check_base(base, model)
        task = _task_from_base(base, model, sizes, self.density, self.candidates)
        parameters = base_parameters(model)
        tuned = {id(parameters[name]) for name in self.dense}
        self._dense_changes = [
            Change(name, p, None, base[name].detach().to(p.device, copy=True), p.detach().clone())
            for name, p in ((name, parameters[name]) for name in self.dense)
        ]
        attached = _attach(model, task)
        # the base that deltas are of is the one that is written now, not the tuned model
        forget_base(model)
        written: set[int] = set()
        for name, parameter in parameters.items():
            if id(parameter) not in tuned | written:
                written.add(id(parameter))
                parameter.copy_(base[name])
        remember_base(model)
        return task, attached

    # ---- learning

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        super().start(optimizer, steps)
        self._act(self._relaxed())

    def after_update(self) -> None:
        learned = self._learned()
        learned.summed += 1
        learned.unrated += 1
        if int(learned.summed) == self.accumulation:
            self._descend()

    def end_epoch(self) -> float | None:
        """Round γ, and keep it if it is the best so far. The Trainer does it by itself.

        Returns:
            Its metric; ``None`` where there is no metric.

        Raises:
            ValueError: the metric is not a number.
        """
        learned = self._learned()
        if int(learned.summed):
            self._descend()
        rounded = rounded_mask(learned.scores, self._prepared_task().patch, self.shift)
        value = None if self.metric is None else self._rate(self.metric, rounded)
        if value is None or value > float(learned.metric):
            learned.graft.copy_(rounded)
            learned.metric.fill_(-math.inf if value is None else value)
        learned.unrated.zero_()
        logger.info("skill grafting: %d entries, metric %s", int(rounded.sum()), value)
        return value

    def finish(self) -> None:
        """The model is the base with the best graft in it. An epoch that has not been ended is ended."""
        if self.result is not None:
            return
        model, task = self.prepared(), self._prepared_task()
        learned = self._learned()
        if int(learned.unrated):
            self.end_epoch()
        self._take_off(model)
        self.result = self._make_result(task, learned)
        self.applied = self._put_graft(model, task, learned.graft)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        if args.fp16 or args.world_size > 1:
            raise ValueError(
                "SkillGrafting: takes gradients as backward gives them, in one process; fp16=True scales them, and "
                "other processes have their own; use bf16=True and one process"
            )
        super().on_train_begin(args, state, control, optimizer, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_epoch()

    # ---- parts

    def _prepared_task(self) -> _Task:
        self.prepared()
        assert self._task is not None
        return self._task

    def _learned(self) -> _Learned:
        learned = self.prepared().get_submodule(NAME)
        assert isinstance(learned, _Learned)
        return learned

    def _collector(self, place: _Place) -> Callable[[Tensor], None]:
        tau = self._prepared_task().entries[place.name].values

        def collect(parameter: Tensor) -> None:
            accumulate_importance_(self._learned().total[place.span], place.gradient(), "product", tau)
            parameter.grad = None

        return collect

    @torch.no_grad()
    def _descend(self) -> None:
        """A step of S along the mean gradient; then its γ acts."""
        learned, patch = self._learned(), self._prepared_task().patch
        gradient = learned.total / learned.summed * mask_slope(learned.scores, patch, self.shift)
        if not bool(gradient.isfinite().all()):
            raise ValueError("SkillGrafting: the gradient is not finite; lower lr")
        learned.scores -= self.lr * gradient
        learned.total.zero_()
        learned.summed.zero_()
        self._act(self._relaxed())

    def _relaxed(self) -> Tensor:
        return relaxed_mask(self._learned().scores, self._prepared_task().patch, self.shift)

    def _act(self, mask: Tensor) -> None:
        change = mask * self._prepared_task().tau
        for place in self._places:
            place.set(change)

    def _rate(self, metric: Callable[[nn.Module], float], rounded: Tensor) -> float:
        model = self.prepared()
        was_training = model.training
        self._act(rounded)
        with torch.no_grad():
            value = float(metric(model))
        model.train(was_training)
        self._act(self._relaxed())
        if math.isnan(value):
            raise ValueError("SkillGrafting: metric must return a number, got nan")
        return value

    def _take_off(self, model: nn.Module) -> None:
        """Leave the base, as it was before the candidates came over it."""
        for hook in self._hooks:
            hook.remove()
        for place in self._places:
            if place.before is not None:
                place.write(place.before)
        if any(place.delta is not None for place in self._places):
            detach(model, NAME)
        del model._modules[NAME]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._asked[name])
        self._hooks, self._places, self.optimizer = [], [], None

    def _make_result(self, task: _Task, learned: _Learned) -> SparseUpdate:
        entries = {
            name: Entries(one.shape, one.flat.cpu(), one.values.cpu()) for name, one in _grafted(task, learned.graft)
        }
        metric = float(learned.metric)
        metadata = {
            "density": self.density,
            "of_entries": task.size,
            "candidates": len(task.patch),
            "from_patch": int((learned.graft & task.patch).sum()),
            "metric": metric if math.isfinite(metric) else None,
        }
        dense = {change.name: change.after.cpu() for change in self._dense_changes}
        assert self._base is not None
        return SparseUpdate(entries, self._base, dense, 1.0, "skill-grafting", metadata)

    def _put_graft(self, model: nn.Module, task: _Task, graft: Tensor) -> Applied:
        assert self.result is not None
        if isinstance(self.reference, SparseUpdate):
            for change in self._dense_changes:
                change.revert()
            return self.result.attach_to(model, NAME)
        parameters, changes = base_parameters(model), list(self._dense_changes)
        masks = dict(zip(task.entries, _split(task, graft), strict=True))
        for name, one in _grafted(task, graft):
            parameter = parameters[name]
            before = parameter.detach()[torch.unravel_index(one.flat, parameter.shape)]
            changes.append(Change(name, parameter, one.flat, before, task.tuned[name][masks[name]]))
        for change in changes:
            change.apply()
        return Applied(model, None, changes)


# ---- γ


def relaxed_mask(scores: Tensor, patch: Tensor, shift: float) -> Tensor:
    """γ = γ0 + (1 - 2 γ0) σ(S - b), [candidates] float32; γ0 is ``patch``."""
    flipped = torch.sigmoid(scores - shift)
    return torch.where(patch, 1 - flipped, flipped)


def mask_slope(scores: Tensor, patch: Tensor, shift: float) -> Tensor:
    """∂γ/∂S = (1 - 2 γ0) f (1 - f) with f = σ(S - b), [candidates] float32."""
    distance = scores - shift
    slope = torch.sigmoid(distance) * torch.sigmoid(-distance)
    return torch.where(patch, -slope, slope)


def rounded_mask(scores: Tensor, patch: Tensor, shift: float) -> Tensor:
    """γ rounded to 0 or 1, [candidates] bool; one half, where S = b, stays with γ0."""
    return patch ^ (scores > shift)


# ---- candidates in a model


def _attach(model: nn.Module, task: _Task) -> dict[str, SparseDelta]:
    linear, _ = read_parameters(model, task.entries, {})
    indices = {layer: SparseIndices.from_flat(one.flat, one.shape) for layer, one in linear.items()}
    return attach(model, indices, NAME)


def _make_places(model: nn.Module, task: _Task, attached: Mapping[str, SparseDelta]) -> list[_Place]:
    parameters, places, begin = base_parameters(model), [], 0
    for name, one in task.entries.items():
        span = slice(begin, begin + len(one.flat))
        begin = span.stop
        delta = attached.get(name.rpartition(".")[0]) if name.endswith(".weight") else None
        if delta is not None:
            places.append(_Place(name, span, one.flat, delta.values, delta, None))
            continue
        parameter = parameters[name]
        before = parameter.detach()[torch.unravel_index(one.flat, parameter.shape)]
        places.append(_Place(name, span, one.flat, parameter, None, before))
    return places


def _split(task: _Task, mask: Tensor) -> tuple[Tensor, ...]:
    return torch.split(mask, [len(one.flat) for one in task.entries.values()])


def _grafted(task: _Task, graft: Tensor) -> list[tuple[str, Entries]]:
    """The entries of the graft by name, without parameters that have none."""
    masks = _split(task, graft)
    pairs = [(name, _subset(one, mask)) for (name, one), mask in zip(task.entries.items(), masks, strict=True)]
    return [(name, one) for name, one in pairs if len(one.flat)]
