"""AdamW whose update can be masked or scaled, and whose state moves when a parameter's entries do.

    optimizer = AdamW(model.parameters(), lr=1e-4)
    optimizer.set_scale(weight, mask)          # entries outside the mask: no update, no decay, moments and age kept
    optimizer.reindex(values, source)          # the entries of `values` have changed places; see there
    optimizer.park([weight])                   # not trained for a while: its state takes a quarter of the memory

Otherwise it is a `torch.optim.Optimizer` like any other: groups, learning-rate schedulers, ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from peftkern.formats import BitMask
from peftkern.ops import adamw

Moments = tuple[Tensor, Tensor]
"""The first and the second moment, float32."""


class AdamW(torch.optim.Optimizer):
    """AdamW with float32 moments; :mod:`peftkern.ops.adamw` has the formulas.

    The state of a parameter holds ``step`` (int), ``exp_avg`` and ``exp_avg_sq`` (float32, of the parameter's shape),
    and where there are such ``age`` (int32, the updates of each entry), ``scale`` (a number, or [rows] float32) and
    ``mask`` (a BitMask's bits). While it is parked, its moments are kept as `AdamW8bit` keeps them.

    Args:
        params: parameters or groups of them: float32, bfloat16 or float16, contiguous or not.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; each update takes ``lr * weight_decay`` of the parameter away.

    Attributes:
        SMALLEST: parameters of fewer entries have float32 moments at all times.

    Raises:
        ValueError: a number is out of range.
    """

    SMALLEST = 4096

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:  # NaN as well
                raise ValueError(f"{type(self).__name__}: {name} must be at least 0, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{type(self).__name__}: betas must be two numbers from 0 to below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    # ---- steps

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Returns what ``closure``, run first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state |= {"step": 0, **self._empty(parameter)}
        self._unpark(parameter, state)
        state["step"] += 1
        self._update(
            parameter,
            gradient,
            state,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state.get("age", state["step"]),
            scale=_scale(parameter, state),
        )

    # ---- how moments are kept

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of moments that are zero."""
        zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def _moments(self, state: dict[str, Any]) -> Moments:
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        return (
            adamw.decode_moment(state["state1"], state["absmax1"], signed=True),
            adamw.decode_moment(state["state2"], state["absmax2"], signed=False),
        )

    def _keep(self, parameter: Tensor, moments: Moments) -> dict[str, Tensor]:
        """The state that holds ``moments``."""
        return {"exp_avg": moments[0], "exp_avg_sq": moments[1]}

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], **numbers: Any) -> None:
        adamw.adamw_(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], **numbers)

    # ---- a step on trial

    @torch.no_grad()
    def probe_(self, parameter: Tensor, values: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """What the next update would make of ``parameter``, to be undone; nothing of the optimizer changes.

        ``values`` become what the update would make of them, bit for bit, and ``gradient`` what they were.

        Args:
            parameter: whose state is read; one that has none, or that is not trained here, has zero moments.
            values: ``parameter`` itself or a copy of it.
            gradient: of its dtype and shape; it is overwritten.
            group: holds ``lr``, ``betas``, ``eps`` and ``weight_decay``, as a parameter group does.

        Raises:
            ValueError, TypeError: as `ops.adamw_probe_` does.
        """
        state = self.state.get(parameter, {})
        self._probe(
            values,
            gradient,
            state,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state.get("age", state.get("step", 0) + 1),
            scale=_scale(parameter, state),
        )

    def _probe(self, values: Tensor, gradient: Tensor, state: dict[str, Any], **numbers: Any) -> None:
        if "state1" in state:
            adamw.adamw_8bit_probe_(values, gradient, *(state[name] for name in _STATE_NAMES), **numbers)
        else:
            adamw.adamw_probe_(values, gradient, state.get("exp_avg"), state.get("exp_avg_sq"), **numbers)

    # ---- parameters that are not trained for a while

    @torch.no_grad()
    def park(self, parameters: Iterable[Tensor]) -> None:
        """Keep the state of ``parameters`` in 8 bits until their next update, which takes up where the last one ended.

        The moments are rounded once, as `AdamW8bit` rounds them; steps, ages and scales stay, and so do the moments of
        parameters of fewer than ``SMALLEST`` entries. What is parked is part of ``state_dict``.

        Args:
            parameters: that this optimizer trains; their gradients are dropped.

        Raises:
            ValueError: the optimizer does not train one of them.
        """
        chosen = list(parameters)
        for parameter in chosen:
            self._check_trained("park", parameter)
        for parameter in chosen:
            parameter.grad = None
            state = self.state.get(parameter, {})
            if "exp_avg" in state and parameter.numel() >= self.SMALLEST:
                state |= _in_8_bits((state.pop("exp_avg"), state.pop("exp_avg_sq")))

    def _unpark(self, parameter: Tensor, state: dict[str, Any]) -> None:
        if "state1" in state:
            moments = self._moments(state)
            for name in _STATE_NAMES:
                del state[name]
            state |= self._keep(parameter, moments)

    # ---- masks, scales and moving entries

    @torch.no_grad()
    def set_scale(self, parameter: Tensor, scale: float | Tensor | BitMask | None) -> None:
        """Multiply the updates of ``parameter`` by ``scale`` from now on, the decay among them.

        Entries with scale 0 keep their value, moments and age. The scale is part of ``state_dict``.

        Args:
            parameter: one that this optimizer trains.
            scale: a number; [rows] float32, one for each ``parameter[i]``; a mask of a matrix; or ``None`` for 1.

        Raises:
            ValueError: the optimizer does not train ``parameter``; a shape or device does not fit; or a scale is
                negative, infinite or NaN.
            TypeError: ``scale`` is none of these.
        """
        self._check_trained("set_scale", parameter)
        adamw.check_scale("set_scale", parameter, scale)
        if isinstance(scale, Tensor):
            _check_finite(scale)
        state = self.state[parameter]
        state.pop("scale", None)
        state.pop("mask", None)
        if isinstance(scale, BitMask):
            state["mask"] = scale.bits.clone()
        elif scale is not None:
            state["scale"] = scale.detach().clone() if isinstance(scale, Tensor) else float(scale)

    @torch.no_grad()
    def reindex(
        self, parameter: Tensor, source: Tensor, moments: Moments | None = None, age: Tensor | None = None
    ) -> None:
        """Let the state follow the rows of ``parameter``, which have been replaced; then every entry has an age.

        Seeding newcomers with the mean gradient of a updates as if they had been trained by it all along:
        ``moments = (mean_g * (1 - β₁ᵃ), mean_g² * (1 - β₂ᵃ))`` and ``age = a``: the next bias correction gives the
        means back. `seeded_moments` computes these.

        Args:
            parameter: one that this optimizer trains; it already has its new rows (entries, where it has one
                dimension).
            source: [rows] int64: for each new row the row that it was before, or -1 for a newcomer. A row may be the
                source of one new row at most.
            moments: both moments of the newcomers, float32, [newcomers, ...] in their order; ``None``: zero.
            age: how many updates the newcomers' moments stand for, int32 of the same shape; ``None``: 0.

        Raises:
            ValueError: the optimizer does not train ``parameter``; a shape does not fit; an index is out of range or
                there twice; or the parameter has a scale for each of its rows, which would have to move as well.
            TypeError: a dtype does not fit.
        """
        self._check_trained("reindex", parameter)
        state = self.state[parameter]
        _check_no_scale(state)
        old = self._old_moments(parameter, state)
        _check_source(source, parameter, old[0].shape[0])
        new = source < 0
        shape = torch.Size((int(new.sum()), *parameter.shape[1:]))
        _check_newcomers(shape, moments, age)
        seeds = (None, None) if moments is None else moments
        old_age = state.get("age", torch.full(old[0].shape, state.get("step", 0), dtype=torch.int32))
        moved_age = _move(old_age.to(parameter.device), source, new, age)
        first, second = (_move(moment, source, new, seed) for moment, seed in zip(old, seeds, strict=True))
        for name in self._empty_names(state):
            state.pop(name, None)
        state |= {"step": state.get("step", 0), **self._keep(parameter, (first, second)), "age": moved_age}

    def _empty_names(self, state: dict[str, Any]) -> list[str]:
        return [name for name in ("exp_avg", "exp_avg_sq", *_STATE_NAMES) if name in state]

    def _old_moments(self, parameter: Tensor, state: dict[str, Any]) -> Moments:
        if "step" in state:
            return self._moments(state)
        zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        return zeros, zeros

    def _check_trained(self, caller: str, parameter: Tensor) -> None:
        if not any(parameter is trained for group in self.param_groups for trained in group["params"]):
            raise ValueError(
                f"{caller}: parameter is none that this optimizer trains; got one of {list(parameter.shape)}"
            )

    # ---- state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave. Tensors keep their dtypes, and go to the device of their parameter."""
        super().load_state_dict(state_dict)
        # torch's own casts every tensor to the dtype of its parameter: moments, ages and codes would be lost
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)


class AdamW8bit(AdamW):
    """AdamW with moments of 8 bits, in blocks of 256 entries; a quarter of `AdamW`'s state.

    The state of a parameter holds ``state1`` and ``state2`` (uint8 codes of the moments), and ``absmax1`` and
    ``absmax2`` (the scales of their blocks). Parameters of fewer than 4096 entries have `AdamW`'s state instead.

    Where an update is masked, frozen entries keep their value and age; their moments are kept as well where a whole
    block is frozen, and where they are 0. Otherwise they are rounded anew with their block.
    """

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.numel() < self.SMALLEST:
            return super()._empty(parameter)
        return dict(zip(_STATE_NAMES, adamw.empty_moments(parameter), strict=True))

    def _keep(self, parameter: Tensor, moments: Moments) -> dict[str, Tensor]:
        return super()._keep(parameter, moments) if parameter.numel() < self.SMALLEST else _in_8_bits(moments)

    def _unpark(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """A parked state is one like any other here."""

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], **numbers: Any) -> None:
        if "exp_avg" in state:
            super()._update(parameter, gradient, state, **numbers)
        else:
            adamw.adamw_8bit_(parameter, gradient, *(state[name] for name in _STATE_NAMES), **numbers)


_STATE_NAMES = ("state1", "state2", "absmax1", "absmax2")


def _in_8_bits(moments: Moments) -> dict[str, Tensor]:
    state1, absmax1 = adamw.encode_moment(moments[0], signed=True)
    state2, absmax2 = adamw.encode_moment(moments[1], signed=False)
    return dict(zip(_STATE_NAMES, (state1, state2, absmax1, absmax2), strict=True))


def seeded_moments(
    mean: Tensor, mean_square: Tensor, age: Tensor | int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The moments that, at ``age`` updates, stand for gradients with these means: see `AdamW.reindex`.

    Args:
        mean: of the gradients, float32.
        mean_square: of their squares, float32.
        age: how many gradients, at least 1; a number or int32 of their shape.
        betas: the optimizer's.
    """
    beta1, beta2 = betas
    updates = torch.as_tensor(age, dtype=torch.float64, device=mean.device)
    return (mean * (1 - beta1**updates)).float(), (mean_square * (1 - beta2**updates)).float()


# ---- helpers


def _scale(parameter: Tensor, state: dict[str, Any]) -> float | Tensor | BitMask | None:
    if "mask" in state:
        return BitMask(state["mask"], parameter.shape)
    scale: float | Tensor | None = state.get("scale")
    return scale


def _check_finite(scale: Tensor) -> None:
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError(
            f"set_scale: every scale must be finite and at least 0, got {float(scale.min())} to {float(scale.max())}"
        )


def _check_no_scale(state: dict[str, Any]) -> None:
    if "mask" in state or isinstance(state.get("scale"), Tensor):
        raise ValueError("reindex: parameter has a scale for each row; call set_scale(parameter, None) first")


def _check_source(source: Tensor, parameter: Tensor, rows: int) -> None:
    if source.dtype != torch.int64:
        raise TypeError(f"reindex: source must be int64, got {source.dtype}")
    if source.shape != parameter.shape[:1]:
        raise ValueError(
            f"reindex: source must be {list(parameter.shape[:1])}, one for each row that parameter has now; "
            f"got {list(source.shape)}"
        )
    if source.numel() == 0:
        return
    first, last = int(source.min()), int(source.max())
    if first < -1 or last >= rows:
        raise ValueError(f"reindex: source must be within -1 and {rows - 1}, got {first} to {last}")
    kept = source[source >= 0]
    if kept.numel() > 0 and int(kept.bincount().max()) > 1:
        raise ValueError("reindex: source names a row twice; the state of a row can go to one place only")


def _check_newcomers(shape: torch.Size, moments: Iterable[Tensor] | None, age: Tensor | None) -> None:
    pairs = [("moments", moment, torch.float32) for moment in moments or ()]
    pairs += [] if age is None else [("age", age, torch.int32)]
    for name, tensor, dtype in pairs:
        if tensor.dtype != dtype:
            raise TypeError(f"reindex: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"reindex: {name} must be {list(shape)}, the newcomers; got {list(tensor.shape)}")


def _move(old: Tensor, source: Tensor, new: Tensor, seed: Tensor | None) -> Tensor:
    """``old`` at ``source``; ``seed`` (zero where ``None``) at the newcomers, where ``new`` is true."""
    moved = old.new_zeros((source.shape[0], *old.shape[1:]))
    moved[~new] = old[source[~new]]
    if seed is not None:
        moved[new] = seed.to(moved.device)
    return moved
