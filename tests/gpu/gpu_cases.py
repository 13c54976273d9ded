"""What tests of the Triton backend share: problems on the GPU, groups of layers, and forced paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lora_problem import TOLERANCE, Problem, make_problem, relative_error
from torch import Tensor

from peftkern.backends import registry
from peftkern.backends.triton import crossover, launch
from peftkern.backends.triton.crossover import FEW_TOKENS, Path
from peftkern.ops.lora_linear import Adapters, lora_linear_backward_reference, lora_linear_reference
from peftkern.ops.lora_linear_group import Member

DEVICE = "cuda"
PATHS = [pytest.param(path, id=path.value) for path in Path]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


def gpu_problem(*arguments: Any, **options: Any) -> Problem:
    """`make_problem` on the GPU."""
    return make_problem(*arguments, **options).to(DEVICE)


@contextmanager
def on_path(path: Path, problem: Problem) -> Iterator[None]:
    """Every product inside takes ``path``; skips the test of a path that cannot compute ``problem``."""
    if path == Path.FEW and problem.x.shape[:-1].numel() > FEW_TOKENS:
        pytest.skip(f"this path takes at most {FEW_TOKENS} tokens")
    if path == Path.FUSED and isinstance(problem.weight, Tensor) and problem.weight.dtype == problem.x.dtype:
        pytest.skip("this path is for weights that have to be decoded or cast")
    with crossover.forced(path):
        yield


def assert_close(results: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Relative errors within those of ``dtype``; no NaN."""
    assert results.keys() == truth.keys()
    errors = {name: relative_error(results[name], truth[name]) for name in truth}
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


def assert_agrees(problem: Problem, path: Path) -> None:
    """Forward and backward on ``path`` agree with float64."""
    with on_path(path, problem):
        results = problem.run("triton")
    assert_close(results, problem.double().run("reference"), problem.x.dtype)


# ---- groups


@dataclasses.dataclass
class Group:
    """Layers that share x: the first problem's."""

    layers: list[Problem]
    seed: Tensor

    @property
    def x(self) -> Tensor:
        return self.layers[0].x

    def members(self) -> list[Member]:
        return [Member(layer.weight, _adapters(layer, self.seed), layer.bias) for layer in self.layers]

    def run(self, need_x: bool = True, need_lora: Sequence[Sequence[bool]] | None = None) -> dict[str, Tensor]:
        """Results by name, as the Triton backend's two entries give them."""
        members = self.members()
        flags = need_lora or [[True] * 2 * len(member.adapters) for member in members]
        y, h = registry.run("lora_linear_group", self.x, members, backend="triton")
        grads = [layer.grad for layer in self.layers]
        backward = (grads, self.x, members, h, need_x, flags)
        grad_x, grad_A, grad_B = registry.run("lora_linear_group_backward", *backward, backend="triton")
        results = {f"y{i}": result for i, result in enumerate(y)} | {"h": h}
        return results | _named(grad_x, grad_A, grad_B)

    def truth(self, need_x: bool = True, need_lora: Sequence[Sequence[bool]] | None = None) -> dict[str, Tensor]:
        """The same from each layer by itself, in float64."""
        results, inner, sums, grad_A, grad_B = {}, [], [], [], []
        for number, layer in enumerate(self.layers):
            exact = layer.double()
            adapters = _adapters(exact, self.seed)
            flags = need_lora[number] if need_lora else [True] * 2 * len(adapters)
            x = self.x.double()
            results[f"y{number}"], h = lora_linear_reference(x, exact.weight, adapters, exact.bias)
            backward = lora_linear_backward_reference(exact.grad, x, exact.weight, adapters, h, need_x, flags)
            inner.append(h)
            sums.append(backward[0])
            grad_A.append(backward[1])
            grad_B.append(backward[2])
        grad_x = sum(sums[1:], sums[0]) if need_x else None
        return results | {"h": torch.cat(inner, 1)} | _named(grad_x, grad_A, grad_B)


def _adapters(problem: Problem, seed: Tensor) -> Adapters:
    return Adapters(problem.lora_A, problem.lora_B, problem.scaling, problem.dropout_p, seed)


def _named(grad_x: Tensor | None, *gradients: Sequence[Sequence[Tensor | None]]) -> dict[str, Tensor]:
    """What was asked for, by name."""
    named = {"x": grad_x} | {
        f"{kind}{member}.{index}": gradient
        for kind, members in zip("AB", gradients, strict=True)
        for member, row in enumerate(members)
        for index, gradient in enumerate(row)
    }
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def make_group(tokens: int, in_features: int, outs: Sequence[int], ranks: list[int], **options: Any) -> Group:
    """Layers of ``outs`` outputs, each with adapters of ``ranks``; no two have a scaling or a dropout in common."""
    layers = []
    for number, out in enumerate(outs):
        layer = gpu_problem(tokens, in_features, out, ranks, seed=number, **options)
        layer.scaling = [scaling * (1 + number) for scaling in layer.scaling]
        layer.dropout_p = [p / (1 + number) for p in layer.dropout_p]
        layers.append(layer)
    return Group(layers, torch.tensor(7 << 40 | 123))


def launched(run: Callable[[], Any]) -> list[tuple[str, int]]:
    """Name and floating-point operations of each kernel that ``run()`` launches, in order."""
    with launch.recording() as launches:
        run()
    return [(entry.kernel, entry.flops) for entry in launches]
