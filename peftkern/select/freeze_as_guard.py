"""FreezeAsGuard: learn which tensors to freeze so that fine-tuning on some data fails and on other data works.

    w_i = wft_i + m_i (wpre_i - wft_i)        m_i = σ(x_i / T);  1: frozen at its pretrained value

Users' level: every update moves wft, through the gradient that reaches it, (1 - m_i) ∂L/∂w_i. Mask's level, every few
updates:

    Lmix = (L_innocent - L_illegal) / 2        x_i ← x_i - η ⟨wpre_i - wft_i, ∂Lmix/∂w_i⟩ ∂m_i/∂x_i
    x_i ← x_i - c ∂/∂x_i (ρ - mean_j m_j)²     with a step size of its own;  ∂m_i/∂x_i = m_i (1 - m_i) / T

In the end masks are rounded. ρ is a share of tensors, whatever their sizes.

Source: FreezeAsGuard, Huang and Gao 2024 (arXiv:2405.17472), and its published scripts, of which the defaults are; they
train diffusion models. Nothing in it depends on that, and the losses here are those of language models. There the
weights are kept with their differences and both are updated; here the pretrained weights are, and w is computed from
them, so that what is frozen is exact. Where c would carry mean(m) past ρ, as it does for models of few tensors, from
which it does not come back, the step ends at ρ.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.integrations.fingerprint import Fingerprint, WrongBaseError, difference_to_base, remember_base
from peftkern.ops.importance import importance_dot
from peftkern.select.hand_over import drop_state
from peftkern.select.method import Method, logger
from peftkern.select.pieces import check_dense

FORMAT, VERSION = "peftkern freeze guard", 1
_IN_OPTIMIZER = "freeze_as_guard"
_BISECTIONS = 60

Batch = Mapping[str, Any]


# ---- the masks


def sigmoid_slope(x: Tensor, temperature: float) -> Tensor:
    """∂m/∂x = m (1 - m) / T."""
    m = torch.sigmoid(x / temperature)
    return m * (1 - m) / temperature


def sparsity_gradient(x: Tensor, freeze_ratio: float, temperature: float) -> Tensor:
    """∂/∂x_i (ρ - mean_j m_j)²."""
    excess = torch.sigmoid(x / temperature).mean() - freeze_ratio
    return 2 * excess / x.numel() * sigmoid_slope(x, temperature)


def sparsity_step(x: Tensor, freeze_ratio: float, temperature: float, size: float) -> Tensor:
    """``x`` after a step of ``size`` down `sparsity_gradient`, or as much of it as carries mean(m) to ρ."""
    step = size * sparsity_gradient(x, freeze_ratio, temperature)

    def excess(part: float) -> float:
        return float(torch.sigmoid((x - part * step) / temperature).mean()) - freeze_ratio

    if excess(0.0) * excess(1.0) >= 0:
        return x - step
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):  # the mean is monotonous in the part: all masks go the same way
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) * excess(0.0) > 0 else (low, middle)
    return x - high * step


# ---- the file


@dataclass(frozen=True)
class FreezeGuard:
    """Which tensors of a model must stay as they are.

    Attributes:
        base: the pretrained model.
        tensors: how many tensors were chosen from.
        frozen: names of parameters, in order of the model.
    """

    base: Fingerprint
    tensors: int
    frozen: tuple[str, ...]

    def __str__(self) -> str:
        return f"freeze guard of {self.base.model}: {len(self.frozen)} of {self.tensors} tensors frozen"

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        data = {"format": FORMAT, "version": VERSION, "tensors": self.tensors, "frozen": list(self.frozen)}
        Path(path).write_text(json.dumps({**data, "base": self.base.to_dict()}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FreezeGuard:
        """What `save` has written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, or one of a newer version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f"it is no {FORMAT}")
            if data.get("version") != VERSION:
                raise ValueError(f"it is of version {data.get('version')!r}, and this program reads version {VERSION}")
            tensors, frozen = data.get("tensors"), data.get("frozen")
            if type(tensors) is not int or not isinstance(frozen, list) or not all(type(n) is str for n in frozen):
                raise ValueError("tensors must be a number and frozen a list of names")
            return cls(Fingerprint.from_dict(data.get("base")), tensors, tuple(frozen))
        except ValueError as error:
            raise ValueError(f"FreezeGuard.load: {path}: {error}") from None


def apply_guard(model: nn.Module, guard: FreezeGuard | str | Path) -> FreezeGuard:
    """Freeze the tensors that ``guard``, or the file of this name, says: call it before an optimizer is made.

    Returns:
        The guard.

    Raises:
        WrongBaseError: it is of another base model.
        ValueError: the model has adapters, which would pass round what is frozen, or is quantized; it has no tensor of
            a frozen name; or the file is no guard. The model is unchanged.
        FileNotFoundError: there is no such file.
    """
    guard = guard if isinstance(guard, FreezeGuard) else FreezeGuard.load(guard)
    check_dense("apply_guard", model)
    difference = difference_to_base(guard.base, model)
    if difference is not None:
        raise WrongBaseError(f"apply_guard: the guard is of {guard.base.model}, not of this model: {difference}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in guard.frozen if name not in parameters]
    if missing:
        raise ValueError(f"apply_guard: the model has no tensor {missing[0]!r}, which the guard freezes")
    for name in guard.frozen:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None
    return guard


# ---- the method


class FreezeAsGuard(Method):
    """Learn masks over tensors while the model is fine-tuned as a user would, then freeze what they say.

    The model is the pretrained one. The optimizer plays the user: the published one is SGD with learning rate 1e-5, and
    a run has 2000 updates, on a mixture of illegal and innocent data. While it runs, the model holds w, between the
    pretrained and the fine-tuned weights. In the end the frozen tensors have their pretrained bits and ask for no
    gradient, the others are fine-tuned. What is given to users is the pretrained model and the guard: `apply_guard`.

    Kept beside the model: its pretrained weights, and their difference to the fine-tuned ones in float32. The
    differences and masks travel with the optimizer's ``state_dict``, so that training goes on from a checkpoint as if
    it had not been interrupted. PyTorch's own optimizers round differences to the parameters' dtype there;
    `peftkern.optim.AdamW` does not.

    Args:
        illegal: batches on which fine-tuning is to fail, that ``model(**batch)`` gives a loss for. They are gone
            through again and again, one for each step of the masks.
        innocent: batches on which it is to work.
        freeze_ratio: ρ, the share of tensors that is frozen.
        temperature: T.
        mask_step: η, the step size of masks along the loss.
        sparsity_step: c, their step size towards ρ.
        user_interval: updates of the weights for each step of the masks.
        fine_tuned: state dict of the model after fine-tuning on mixed data, which the published form starts from.
            ``None``: start from the pretrained weights.
        file: where the guard is written in the end; ``None``: nowhere.
        seed: of the masks' start: x is uniform between 0 and 1.

    Attributes:
        guard: what is frozen; ``None`` before `finish`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        illegal: Iterable[Batch],
        innocent: Iterable[Batch],
        freeze_ratio: float = 0.2,
        temperature: float = 0.2,
        mask_step: float = 10.0,
        sparsity_step: float = 5e3,
        user_interval: int = 5,
        fine_tuned: Mapping[str, Tensor] | None = None,
        file: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check("freeze_ratio", 0 <= freeze_ratio <= 1, "from 0 to 1", freeze_ratio)
        _check("temperature", temperature > 0, "more than 0", temperature)
        _check("mask_step", mask_step >= 0, "at least 0", mask_step)
        _check("sparsity_step", sparsity_step >= 0, "at least 0", sparsity_step)
        _check("user_interval", user_interval >= 1, "at least 1", user_interval)
        self.freeze_ratio, self.temperature, self.user_interval = freeze_ratio, temperature, user_interval
        self.mask_step, self.sparsity_step, self.seed, self.file = mask_step, sparsity_step, seed, file
        self.guard: FreezeGuard | None = None
        self._illegal, self._innocent = _Endless("illegal", illegal), _Endless("innocent", innocent)
        self._fine_tuned = fine_tuned
        self._tensors: list[_Tensor] = []
        self._x = torch.empty(0, dtype=torch.float64)
        self._base: Fingerprint | None = None

    @property
    def masks(self) -> dict[str, float]:
        """m by name of the parameter."""
        return {tensor.name: float(m) for tensor, m in zip(self._tensors, self._masks(), strict=True)}

    def prepare(self, model: nn.Module) -> None:
        """Take the weights of ``model`` as the pretrained ones, and draw masks.

        Raises:
            ValueError: the model carries adapters, is quantized, or has nothing that asks for a gradient; or
                ``fine_tuned`` is of another model.
        """
        super().prepare(model)
        if self._tensors:  # prepared, and not finished
            return
        try:
            check_dense("FreezeAsGuard", model)
            tensors = _take_tensors(model, self._fine_tuned)
            self._base = Fingerprint.of(model)
        except BaseException:
            self.model = None
            raise
        remember_base(model)
        generator = torch.Generator().manual_seed(self.seed)
        self._tensors = tensors
        self._x = torch.rand(len(tensors), generator=generator, dtype=torch.float64)
        self._relax()

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        super().start(optimizer, steps)
        saved = optimizer.param_groups[0].get(_IN_OPTIMIZER)
        if saved is None:
            return
        self.steps_done = saved["steps"]
        self._x = torch.tensor(saved["x"], dtype=torch.float64)
        for tensor in self._tensors:
            difference = optimizer.state.get(tensor.parameter, {}).get(_IN_OPTIMIZER)
            if difference is not None:
                tensor.difference.copy_(difference)
        for data in (self._illegal, self._innocent):
            data.go_to(self.steps_done // self.user_interval)
        self._relax()

    @torch.no_grad()
    def before_update(self) -> None:
        """The optimizer finds the fine-tuned weights, and their gradients."""
        for tensor, free in zip(self._tensors, (1 - self._masks()).tolist(), strict=True):
            if tensor.parameter.grad is not None:
                tensor.parameter.grad.mul_(free)
                tensor.set(1.0)

    @torch.no_grad()
    def after_update(self) -> None:
        for tensor in self._tensors:
            if tensor.parameter.grad is not None:
                tensor.difference.copy_(tensor.pretrained.float() - tensor.parameter.float())
        if self.steps_done % self.user_interval == 0:
            self._relax()
            self._step_masks()
        self._relax()
        self._keep_in_optimizer()

    def finish(self) -> None:
        """Round the masks, set both kinds of tensors to what they are, and write the guard."""
        self.prepared()
        assert self._base is not None
        frozen = [mask > 0.5 for mask in self._masks().tolist()]
        for tensor, stays in zip(self._tensors, frozen, strict=True):
            tensor.set(0.0 if stays else 1.0)
            tensor.parameter.requires_grad_(not stays)
        names = tuple(tensor.name for tensor, stays in zip(self._tensors, frozen, strict=True) if stays)
        self.guard = FreezeGuard(self._base, len(self._tensors), names)
        logger.info("%s", self.guard)
        if self.file is not None:
            self.guard.save(self.file)
        self._leave_optimizer([tensor.parameter for tensor, stays in zip(self._tensors, frozen, strict=True) if stays])
        self._tensors = []

    # ---- parts

    def _masks(self) -> Tensor:
        return torch.sigmoid(self._x / self.temperature)

    def _relax(self) -> None:
        """w = wft + m (wpre - wft)."""
        for tensor, free in zip(self._tensors, (1 - self._masks()).tolist(), strict=True):
            tensor.set(free)

    def _step_masks(self) -> None:
        dots = self._dots()
        if not bool(dots.isfinite().all()):
            raise RuntimeError("FreezeAsGuard: the gradient of illegal or innocent data is not finite")
        # both terms at the masks before the step
        pull = self.mask_step * dots * sigmoid_slope(self._x, self.temperature)
        self._x = sparsity_step(self._x, self.freeze_ratio, self.temperature, self.sparsity_step) - pull

    def _dots(self) -> Tensor:
        """⟨wpre - wft, ∂Lmix/∂w⟩ of every tensor; gradients go as soon as they have come."""
        dots = [torch.zeros((), device=tensor.parameter.device) for tensor in self._tensors]
        with torch.enable_grad(), _caught(self._tensors, dots):
            for data, factor in ((self._illegal, -0.5), (self._innocent, 0.5)):
                loss = factor * self.prepared()(**data.next(self._device())).loss
                loss.backward()
        return torch.stack([dot.cpu().double() for dot in dots])

    def _device(self) -> torch.device:
        return self._tensors[0].parameter.device

    def _keep_in_optimizer(self) -> None:
        optimizer = self.started()
        optimizer.param_groups[0][_IN_OPTIMIZER] = {"x": self._x.tolist(), "steps": self.steps_done}
        for tensor in self._tensors:
            # an optimizer that has not updated a parameter takes an empty state for the sign of that
            if optimizer.state.get(tensor.parameter) or isinstance(optimizer, torch.optim.SGD):
                optimizer.state[tensor.parameter][_IN_OPTIMIZER] = tensor.difference

    def _leave_optimizer(self, frozen: Iterable[nn.Parameter]) -> None:
        if self.optimizer is None:
            return
        drop_state(self.optimizer, frozen)
        self.optimizer.param_groups[0].pop(_IN_OPTIMIZER, None)
        for state in self.optimizer.state.values():
            state.pop(_IN_OPTIMIZER, None)
        self.optimizer = None


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A parameter, its pretrained value, and in float32 what that has more than the fine-tuned one."""

    name: str
    parameter: nn.Parameter
    pretrained: Tensor
    difference: Tensor

    @torch.no_grad()
    def set(self, free: float) -> None:
        """w = wpre - (1 - m) (wpre - wft), ``free`` being 1 - m."""
        if free == 0.0:
            self.parameter.copy_(self.pretrained)
        else:
            self.parameter.copy_(self.pretrained.float() - free * self.difference)


def _take_tensors(model: nn.Module, fine_tuned: Mapping[str, Tensor] | None) -> list[_Tensor]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("FreezeAsGuard: no parameter of the model asks for a gradient; unfreeze what users may train")
    tensors = []
    for name, parameter in named:
        tuned = parameter.detach() if fine_tuned is None else fine_tuned.get(name)
        if tuned is None or tuned.shape != parameter.shape:
            found = "nothing" if tuned is None else list(tuned.shape)
            raise ValueError(f"FreezeAsGuard: fine_tuned must have {name} of {list(parameter.shape)}, got {found}")
        pretrained = parameter.detach().clone()
        tensors.append(_Tensor(name, parameter, pretrained, pretrained.float() - tuned.to(parameter.device).float()))
    return tensors


@contextlib.contextmanager
def _caught(tensors: list[_Tensor], dots: list[Tensor]) -> Iterator[None]:
    """Gradients of ``tensors`` go into ``dots`` and nowhere else."""

    def catch(parameter: Tensor, tensor: _Tensor, dot: Tensor) -> None:
        assert parameter.grad is not None
        dot += importance_dot(parameter.grad, tensor.difference)
        parameter.grad = None

    handles = []
    try:
        for tensor, dot in zip(tensors, dots, strict=True):
            tensor.parameter.grad = None
            hook = partial(catch, tensor=tensor, dot=dot)
            handles.append(tensor.parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Endless:
    """Batches again and again."""

    def __init__(self, name: str, batches: Iterable[Batch]) -> None:
        self._name, self._batches = name, batches
        self._left: Iterator[Batch] = iter(())
        self._taken = 0

    def next(self, device: torch.device | None = None) -> Batch:
        batch = next(self._left, None)
        if batch is None:
            self._left = iter(self._batches)
            batch = next(self._left, None)
        if batch is None:
            raise ValueError(
                f"FreezeAsGuard: {self._name} must hold batches that can be gone through again, as a list or a "
                f"DataLoader does; it gave {self._taken} and now none"
            )
        self._taken += 1
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def go_to(self, taken: int) -> None:
        """Pass over batches until ``taken`` of them are gone."""
        while self._taken < taken:
            self.next()


def _check(name: str, fits: bool, rule: str, value: float) -> None:
    if not fits:
        raise ValueError(f"FreezeAsGuard: {name} must be {rule}, got {value}")
