"""What sparse training runs beside products with whole weights: deltas, masks, updates, selection, importance.

Each is an item as in :mod:`.items`, and says itself how others do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.backends.triton import launch
from peftkern.backends.triton.launch import Launch
from peftkern.backends.triton.roofline import Arithmetic, Direction, arithmetic_of
from peftkern.formats import BitMask, SparseIndices
from peftkern.gpu_check import peers, references
from peftkern.gpu_check.items import Bench
from peftkern.gpu_check.rows import Row
from peftkern.ops.adamw import coefficients_of, empty_moments
from peftkern.ops.lora_linear import Adapters
from peftkern.ops.select_top import PASSES, Scored

Operands = Mapping[str, Any]
"""By name: tensors, index sets, masks and numbers. What is changed in place is among them."""
Call = Callable[[], object]

_SCALING = 2.0


@dataclass(frozen=True)
class TrainingItem:
    """What these items have in common.

    ``_run`` gives the results, those in place included; ``_exact`` what they have to be, from operands that nothing has
    changed; ``_limit`` says how far from it they may be. ``_peer`` is how one of `peers` does the same.
    """

    shape: tuple[int, int]

    @property
    def title(self) -> str:
        return f"{self._name}, {self._shape}" + ("" if self._tokens is None else f", {self._tokens} tokens")

    @property
    def peers(self) -> tuple[str, ...]:
        """Who else is timed."""
        return ()

    def launches(self) -> list[Launch]:
        with launch.recording() as launches:
            self.run_once("meta")
        return launches

    def run_once(self, device: str) -> None:
        self._run(self._make(device), "triton")

    def rows(self, bench: Bench) -> Iterator[Row]:
        first = self._make(bench.device)
        found = self._run(_copy(first), bench.backend)
        error = self._error(found, self._exact(first))
        count = bench.timer.copies(_bytes(first))
        sets = [first, *(_copy(first) for _ in range(count - 1))]
        others = {
            name: bench.timer.seconds([self._peer(name, _copy(one)) for one in sets])
            for name in self.peers
            if name in bench.peers
        }
        seconds = bench.timer.seconds([partial(self._run, one, bench.backend) for one in sets])
        yield Row(
            self._name,
            self._shape,
            self._tokens,
            seconds,
            self._moved(first, found),
            self._flops(first),
            self._arithmetic,
            others,
            error,
            self._limit,
        )

    @property
    def _name(self) -> str:
        raise NotImplementedError

    @property
    def _shape(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}"

    @property
    def _tokens(self) -> int | None:
        return None

    @property
    def _arithmetic(self) -> Arithmetic:
        return "single"

    @property
    def _limit(self) -> float:
        return 0.0

    def _make(self, device: str) -> Operands:
        raise NotImplementedError

    def _run(self, operands: Operands, backend: str) -> list[Tensor]:
        raise NotImplementedError

    def _exact(self, operands: Operands) -> list[Tensor]:
        raise NotImplementedError

    def _peer(self, name: str, operands: Operands) -> Call:
        raise NotImplementedError

    def _error(self, found: list[Tensor], exact: list[Tensor]) -> float:
        return references.differing_share(found, exact)

    def _moved(self, operands: Operands, found: list[Tensor]) -> int:
        """Every operand read once, every result written once."""
        return _bytes(operands) + sum(tensor.nbytes for tensor in found)

    def _flops(self, operands: Operands) -> int:
        return 0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, SparseIndices):
        return list(value.tensors())
    return [value.bits] if isinstance(value, BitMask) else [value] if isinstance(value, Tensor) else []


def _bytes(operands: Operands) -> int:
    return sum(tensor.nbytes for value in operands.values() for tensor in _tensors(value))


def _copy(operands: Operands) -> Operands:
    return {name: _copied(value) for name, value in operands.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, SparseIndices):
        return SparseIndices(value.shape, *(tensor.clone() for tensor in value.tensors()))
    if isinstance(value, BitMask):
        return replace(value, bits=value.bits.clone())
    return value.clone() if isinstance(value, Tensor) else value


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(references.relative_error(*pair) for pair in zip(found, exact, strict=True))


# ---- products


@dataclass(frozen=True)
class _Product(TrainingItem):
    """A product with a share of the entries of a weight [out, in]."""

    density: float
    tokens: int
    dtype: torch.dtype
    direction: Direction

    @property
    def _tokens(self) -> int:
        return self.tokens

    @property
    def _arithmetic(self) -> Arithmetic:
        return arithmetic_of(self.dtype)

    @property
    def _limit(self) -> float:
        return references.LIMITS[self.dtype]

    def _error(self, found: list[Tensor], exact: list[Tensor]) -> float:
        return _worst(found, exact)


@dataclass(frozen=True)
class SparseProduct(_Product):
    """``y += s x Sᵀ``, or backward dX and the gradient of the values."""

    @property
    def peers(self) -> tuple[str, ...]:
        # PyTorch samples a product at 16-bit entries on no device
        return (peers.CUBLAS, peers.TORCH_SPARSE) if self.direction == "forward" else (peers.CUBLAS,)

    @property
    def _name(self) -> str:
        return f"{self.direction} sparse delta {self.density:.1%}, {_dtype(self.dtype)}"

    def _make(self, device: str) -> Operands:
        rows, columns = self.shape
        indices = _random_indices(self.shape, self.density, device)
        values = torch.randn(len(indices), device=device)
        names = (
            {"x": columns, "y": rows} if self.direction == "forward" else {"grad": rows, "x": columns, "dx": columns}
        )
        made = {name: torch.randn(self.tokens, size, device=device).to(self.dtype) for name, size in names.items()}
        return {"indices": indices, "values": values, **made}

    def _run(self, operands: Operands, backend: str) -> list[Tensor]:
        delta = (operands["values"], operands["indices"], _SCALING)
        if self.direction == "forward":
            registry.run("sparse_delta", operands["y"], operands["x"], *delta, backend=backend)
            return [operands["y"]]
        tensors = (operands["grad"], operands["x"], operands["dx"])
        gradient = registry.run("sparse_delta_backward", *tensors, *delta, True, backend=backend)
        return [operands["dx"], gradient]

    def _exact(self, operands: Operands) -> list[Tensor]:
        indices, x = operands["indices"], operands["x"].double()
        dense = _SCALING * indices.to_dense(operands["values"].double())
        if self.direction == "forward":
            return [operands["y"].double() + x @ dense.t()]
        grad = operands["grad"].double()
        return [operands["dx"].double() + grad @ dense, _SCALING * indices.gather(grad.t() @ x)]

    def _peer(self, name: str, operands: Operands) -> Call:
        indices, x = operands["indices"], operands["x"]
        values = (_SCALING * operands["values"]).to(x.dtype)
        if name == peers.TORCH_SPARSE:
            matrix = torch.sparse_csr_tensor(indices.row_offsets, indices.columns.long(), values, indices.shape)
            return lambda: operands["y"] + (matrix @ x.t()).t()
        dense = indices.to_dense(values)
        if self.direction == "forward":
            return lambda: torch.addmm(operands["y"], x, dense.t())
        grad, flat = operands["grad"], indices.flat()
        return lambda: (torch.addmm(operands["dx"], grad, dense), torch.mm(grad.t(), x).view(-1)[flat])

    def _flops(self, operands: Operands) -> int:
        products = 1 if self.direction == "forward" else 2
        return products * 2 * self.tokens * len(operands["indices"])


@dataclass(frozen=True)
class MaskedProduct(_Product):
    """``x (M ⊙ W)ᵀ``, or backward dX and the masked gradient of a dense W."""

    @property
    def peers(self) -> tuple[str, ...]:
        return (peers.CUBLAS, peers.TORCH)

    @property
    def _name(self) -> str:
        return f"{self.direction} masked weight {self.density:.0%}, {_dtype(self.dtype)}"

    def _make(self, device: str) -> Operands:
        rows, columns = self.shape
        sizes = {"weight": (rows, columns), "x": (self.tokens, columns)}
        sizes |= {} if self.direction == "forward" else {"grad": (self.tokens, rows)}
        made = {name: torch.randn(size, device=device).to(self.dtype) for name, size in sizes.items()}
        return {"mask": _random_mask(self.shape, self.density, device), **made}

    def _run(self, operands: Operands, backend: str) -> list[Tensor]:
        weight, mask, x = operands["weight"], operands["mask"], operands["x"]
        adapters = Adapters([], [], [], [], None)
        if self.direction == "forward":
            return [registry.run("masked_linear", x, weight, mask, adapters, None, backend=backend)[0]]
        h = x.new_empty(self.tokens, 0, dtype=torch.float32)
        arguments: tuple[Any, ...] = (operands["grad"], x, weight, mask, adapters, h, True, True, [])
        return list(registry.run("masked_linear_backward", *arguments, backend=backend)[:2])

    def _exact(self, operands: Operands) -> list[Tensor]:
        kept = operands["mask"].mask()
        masked, x = operands["weight"].double() * kept, operands["x"].double()
        if self.direction == "forward":
            return [x @ masked.t()]
        grad = operands["grad"].double()
        return [grad @ masked, (grad.t() @ x) * kept]

    def _peer(self, name: str, operands: Operands) -> Call:
        weight: Tensor = operands["weight"]
        kept: Tensor = operands["mask"].mask()
        x: Tensor = operands["x"]
        ready = weight * kept if name == peers.CUBLAS else None

        def masked() -> Tensor:
            """Masked before, or as the usual way is, at every call."""
            return weight * kept if ready is None else ready

        if self.direction == "forward":
            return lambda: torch.mm(x, masked().t())
        grad = operands["grad"]
        if ready is not None:
            return lambda: (torch.mm(grad, ready), torch.mm(grad.t(), x))
        return lambda: (torch.mm(grad, masked()), torch.mm(grad.t(), x) * kept)

    def _flops(self, operands: Operands) -> int:
        return (1 if self.direction == "forward" else 2) * 2 * self.tokens * self.shape[0] * self.shape[1]


def _random_mask(shape: tuple[int, int], density: float, device: str) -> BitMask:
    if device == "meta":
        bits = torch.empty(shape[0], -(-shape[1] // 8), dtype=torch.uint8, device=device)
        return BitMask(bits, torch.Size(shape))
    return BitMask.from_mask(torch.rand(shape, device=device) < density)


def _random_indices(shape: tuple[int, int], density: float, device: str) -> SparseIndices:
    if device != "meta":
        return SparseIndices.from_mask(torch.rand(shape, device=device) < density)
    entries = (torch.empty(round(density * shape[0] * shape[1]), dtype=torch.int32, device=device) for _ in range(3))
    offsets = (torch.empty(size + 1, dtype=torch.int64, device=device) for size in shape)
    columns, rows, order = entries
    row_offsets, column_offsets = offsets
    return SparseIndices(torch.Size(shape), row_offsets, columns, column_offsets, rows, order)


# ---- entry by entry


@dataclass(frozen=True)
class Update(TrainingItem):
    """One update by AdamW with moments of ``bits``; ``kept``: the share of entries that a mask trains, or all.

    ``probe``: on trial.
    """

    bits: int
    dtype: torch.dtype
    kept: float | None = None
    probe: bool = False

    @property
    def peers(self) -> tuple[str, ...]:
        if self.kept is not None or self.probe:
            return ()
        return (peers.BITSANDBYTES,) if self.dtype != torch.float32 or self.bits == 8 else (peers.TORCH,)

    @property
    def _name(self) -> str:
        kept = "" if self.kept is None else f", {self.kept:.0%} trained"
        probe = " on trial" if self.probe else ""
        return f"AdamW {self.bits}-bit{probe}{kept}, {_dtype(self.dtype)}"

    def _make(self, device: str) -> Operands:
        parameter, gradient = (torch.randn(self.shape, device=device).to(self.dtype) for _ in range(2))
        made: dict[str, Any] = {"parameter": parameter, "gradient": gradient}
        if self.bits == 8 and device != "meta":
            made |= dict(zip(_MOMENTS[8], empty_moments(parameter), strict=True))
        elif self.bits == 8:
            scales = torch.empty(-(-parameter.numel() // 256), device=device)
            codes = parameter.to(torch.uint8)
            made |= dict(zip(_MOMENTS[8], (codes, codes, scales, scales), strict=True))
        else:
            made |= {name: torch.zeros(self.shape, device=device) for name in _MOMENTS[32]}
        return made if self.kept is None else {**made, "mask": _random_mask(self.shape, self.kept, device)}

    def _run(self, operands: Operands, backend: str) -> list[Tensor]:
        parameter, gradient = operands["parameter"], operands["gradient"]
        moments = [operands[name] for name in _MOMENTS[self.bits]]
        coefficients, _ = coefficients_of(parameter.device, 1e-3, (0.9, 0.999), 1e-8, 0.01, 1)
        operation = ("adamw_8bit" if self.bits == 8 else "adamw") + ("_probe" if self.probe else "")
        settings = (coefficients, None, operands.get("mask"))
        registry.run(operation, parameter, gradient, *moments, *settings, backend=backend)
        return [parameter, gradient] if self.probe else [parameter, *moments]

    def _exact(self, operands: Operands) -> list[Tensor]:
        return self._run(_copy(operands), "reference")

    def _peer(self, name: str, operands: Operands) -> Call:
        parameter = torch.nn.Parameter(operands["parameter"])
        parameter.grad = operands["gradient"]
        if name == peers.TORCH:
            step: Call = torch.optim.AdamW([parameter], fused=True).step
            return step
        from bitsandbytes import optim

        optimizer = optim.AdamW([parameter], optim_bits=self.bits)
        return optimizer.step  # type: ignore[no-any-return]


_MOMENTS = {32: ("mean", "square"), 8: ("mean", "square", "mean scales", "square scales")}


@dataclass(frozen=True)
class Selection(TrainingItem):
    """The passes that find the ``kept`` largest magnitudes of a tensor; what the host decides between them is known.

    ``excluded``: the share of entries that are passed over.
    """

    kept: float
    dtype: torch.dtype
    excluded: float = 0.0

    @property
    def peers(self) -> tuple[str, ...]:
        return () if self.excluded else (peers.TORCH,)

    @property
    def _name(self) -> str:
        excluded = f", {self.excluded:.0%} excluded" if self.excluded else ""
        return f"select top {self.kept:.0%}{excluded}, {_dtype(self.dtype)}"

    def _make(self, device: str) -> Operands:
        a = torch.randn(self.shape[0] * self.shape[1], device=device).to(self.dtype)
        operands: dict[str, Any] = {"a": a}
        if self.excluded:
            operands["exclude"] = torch.arange(0, a.numel(), round(1 / self.excluded), device=device)
        count = round(self.kept * a.numel())
        key, ties = (1 << 31, 0) if a.is_meta else _bound(a, operands.get("exclude"), count)
        return operands | {"key": key, "ties": ties, "count": count}

    def _run(self, operands: Operands, backend: str) -> list[Tensor]:
        entry = Scored("magnitude", operands["a"], None, operands.get("exclude"))
        key = operands["key"]
        histograms = [
            registry.run("score_histogram", entry, shift, bits, key >> (shift + bits), backend=backend)
            for shift, bits in PASSES
        ]
        collected = (key, operands["ties"], operands["count"])
        return [*histograms, registry.run("score_collect", entry, *collected, backend=backend)]

    def _exact(self, operands: Operands) -> list[Tensor]:
        return self._run(operands, "reference")

    def _peer(self, name: str, operands: Operands) -> Call:
        return lambda: torch.topk(operands["a"].abs(), operands["count"], sorted=False)


def _bound(a: Tensor, exclude: Tensor | None, count: int) -> tuple[int, int]:
    """The key of the ``count``-th largest magnitude, and how many that equal it are taken."""
    scores = a.float().abs()
    if exclude is not None:
        scores[exclude] = -1.0
    bound = scores.topk(count).values[-1]
    return int(bound.view(torch.int32)) | 1 << 31, count - int((scores > bound).sum())


@dataclass(frozen=True)
class Importance(TrainingItem):
    """Products of a gradient and another tensor, summed up ``over`` batches ("entries"), rows, or all of them.

    ``over`` "probe": all products with the difference of two tensors.
    """

    over: str
    dtype: torch.dtype

    @property
    def _name(self) -> str:
        return f"importance {'of a' if self.over == 'probe' else 'over'} {self.over}, {_dtype(self.dtype)}"

    @property
    def _limit(self) -> float:
        return _SUM_LIMIT

    def _make(self, device: str) -> Operands:
        gradient, other = (torch.rand(self.shape, device=device).to(self.dtype) for _ in range(2))
        operands = {"gradient": gradient, "other": other}
        if self.over == "probe":
            # below the other, so that terms do not cancel
            return operands | {"saved": other / 2}
        if self.over == "all":
            return operands
        return operands | {"total": torch.zeros(self.shape if self.over == "entries" else self.shape[0], device=device)}

    def _run(self, operands: Operands, backend: str) -> list[Tensor]:
        gradient, other = operands["gradient"], operands["other"]
        if self.over == "all":
            return [registry.run("importance_dot", gradient, other, backend=backend)]
        if self.over == "probe":
            return [registry.run("probe_dot", gradient, other, operands["saved"], backend=backend)]
        total = operands["total"]
        registry.run("accumulate_importance", total, gradient, "product", other, backend=backend)
        return [total]

    def _exact(self, operands: Operands) -> list[Tensor]:
        other = operands["other"].double()
        terms = operands["gradient"].double() * (other - operands["saved"].double() if "saved" in operands else other)
        return [terms if self.over == "entries" else terms.sum(1) if self.over == "rows" else terms.sum()]

    def _error(self, found: list[Tensor], exact: list[Tensor]) -> float:
        return _worst(found, exact)


_SUM_LIMIT = 2e-7
"""Products and sums are rounded to float32 once each."""
