"""Root mean square norms: which are taken, and that they compute what they computed before."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from patch_models import TOLERANCE, assert_same_run, classes, error, fused_modules, llama, lora, run, text
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftkern.backends import cpu
from peftkern.patch import norms as norms_file
from peftkern.patch import patch, unpatch, verify
from peftkern.patch.norms import FEWEST_NUMBERS, NORMS, norm_kind
from peftkern.patch.verification import TOLERANCES

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the native module")

FEATURES = 24
ROWS = 750  # enough numbers for the fused path to be taken

LLAMA = """
input_dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * x.to(input_dtype)
"""
OLMO2 = LLAMA.replace("self.weight * x.to(input_dtype)", "(self.weight * x).to(input_dtype)")
T5 = """
variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
if self.weight.dtype in [torch.float16, torch.bfloat16]:
    x = x.to(self.weight.dtype)
return self.weight * x
"""
GEMMA = """
output = self._norm(x.float())
output = output * (1.0 + self.weight.float())
return output.type_as(x)
"""
TORCH = "return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)"
KINDS = {norms_file._LLAMA: (LLAMA, T5), norms_file._OLMO2: (OLMO2,), norms_file._GEMMA: (GEMMA,)}
KINDS[norms_file._TORCH] = (TORCH,)


class _Renamed(ast.NodeTransformer):
    """The name of the input differs from class to class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name("x" if node.id == self.name else node.id, node.ctx)


def body_of(forward: Any) -> str:
    source = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    assert isinstance(source, ast.FunctionDef)
    [_, argument] = [argument.arg for argument in source.args.args]
    body = source.body[1:] if ast.get_docstring(source) is not None else source.body
    return ast.dump(_Renamed(argument).visit(ast.Module(body, [])))


def class_of(key: str) -> Any:
    module, name = key.rsplit(".", 1)
    return getattr(
        importlib.import_module(module if module.startswith("torch.") else f"transformers.models.{module}"), name
    )


def make(norm_class: Any, dtype: torch.dtype = torch.float32, features: int = FEATURES) -> Any:
    torch.manual_seed(4)
    norm = norm_class(features, eps=1e-5)
    nn.init.normal_(norm.weight, 0.7, 0.3)
    return norm.to(dtype)


def run_norm(norm: nn.Module, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(2, rows // 2, FEATURES, generator=generator) * 2).to(dtype).requires_grad_()
    y = norm(x)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    gradients = [p.grad for p in (x, *norm.parameters()) if p.grad is not None]
    norm.zero_grad()
    return [y.detach(), *gradients]


def worst_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert all(a.dtype == e.dtype for a, e in zip(actual, expected, strict=True))
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("key", NORMS)
def test_every_known_class_computes_what_the_fused_forward_does(key: str) -> None:
    norm_class = class_of(key)
    bodies = [ast.dump(ast.parse(body.strip())) for body in KINDS[NORMS[key]]]
    assert body_of(norm_class.forward) in bodies
    assert norm_kind(norm_class) == NORMS[key]
    if NORMS[key] is norms_file._GEMMA:
        inner = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
        assert body_of(norm_class._norm) == ast.dump(ast.parse(inner))

    norm = norm_class(FEATURES)
    nn.init.normal_(norm.weight, 0.7, 0.3)
    if getattr(norm, NORMS[key].eps) is None:
        norm.eps = 1e-6
    expected = run_norm(norm)
    report = patch(norm)
    assert [(row.module, row.action, row.kernel) for row in report.rows] == [("", "fused", "rms_norm on cpu")]
    assert 0 < worst_error(run_norm(norm), expected) <= TOLERANCE  # 0: the original ran
    assert unpatch(norm) == 1
    assert worst_error(run_norm(norm), expected) == 0.0


# ---- models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_what_it_computed(dtype: torch.dtype) -> None:
    model, batch = lora(llama(dtype=dtype)), text(4, 100)
    was = classes(model)
    unpatched = model(**batch).logits
    expected = run(model, batch)
    report = patch(model)
    taken = [row.module for row in report.fused if row.kind == "LlamaRMSNorm"]
    assert len(taken) == 5 and taken[-1] == "base_model.model.model.norm"
    assert "5  LlamaRMSNorm" not in str(report) and "rms_norm on cpu" in str(report)
    assert_same_run(model, batch, expected, 10 * TOLERANCES[dtype])
    assert verify(model, batch).ok
    assert unpatch(model) == 25
    assert classes(model) == was
    assert torch.equal(model(**batch).logits, unpatched)


def test_verify_compares_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    patch(model)
    report = verify(model, text(4, 100))
    assert report.ok, str(report)
    assert sum(row.what == "output" and row.name.endswith("norm") for row in report.rows) == 5
    real = norms_file.rms_norm

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(norms_file, "rms_norm", wrong)
    report = verify(model, text(4, 100))
    assert not report.ok and report.worst.name.endswith("norm")


def test_gradient_checkpointing() -> None:
    model, batch = lora(llama()), text(4, 100)
    expected = run(model, batch)
    model.gradient_checkpointing_enable()
    patch(model)
    assert_same_run(model, batch, expected)


def test_one_tensor_is_kept_instead_of_two() -> None:
    norm, x = make(LlamaRMSNorm), torch.randn(ROWS, FEATURES, requires_grad=True)

    def kept() -> int:
        tensors: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
            norm(x)
        return sum(tensor.shape == x.shape for tensor in tensors.values())

    assert kept() == 2
    patch(norm)
    assert kept() == 1


# ---- single norms


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(norm_class: Any, dtype: torch.dtype) -> None:
    norm = make(norm_class, dtype)
    exact = run_norm(copy.deepcopy(norm).double(), torch.float64) if norm_class is GemmaRMSNorm else None
    before = run_norm(norm, dtype)
    patch(norm)
    after = run_norm(norm, dtype)
    assert after[0].dtype == dtype
    assert worst_error(after, before) <= 2 * TOLERANCES[dtype]
    assert exact is None or error(after[0], exact[0]) <= 2 * TOLERANCES[dtype]
    assert error(after[0], before[0]) <= TOLERANCES[dtype] / 20  # the casts are in the same places


def test_a_weight_wider_than_its_input_widens_the_result_as_before() -> None:
    norm = make(LlamaRMSNorm)
    expected = run_norm(norm, torch.bfloat16)
    patch(norm)
    assert worst_error(run_norm(norm, torch.bfloat16), expected) == 0.0
    [(reason, count)] = patch(norm).rows[0].calls_left.items()
    assert reason.startswith("its weight is torch.float32 and its input torch.bfloat16") and count == 1
    gemma = make(GemmaRMSNorm)
    expected = run_norm(gemma, torch.bfloat16)
    patch(gemma)
    assert worst_error(run_norm(gemma, torch.bfloat16), expected) <= 2 * TOLERANCES[torch.bfloat16]
    assert not patch(gemma).rows[0].calls_left


@pytest.mark.parametrize("forced", [False, True])
def test_short_inputs_run_the_original_unless_a_backend_is_forced(
    forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, calls = make(LlamaRMSNorm), []
    real = norms_file.rms_norm
    monkeypatch.setattr(norms_file, "rms_norm", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    row = patch(norm, kernels="cpu" if forced else "auto").rows[0]
    assert (str(FEWEST_NUMBERS) in row.reason) == (not forced)
    norm(torch.randn((FEWEST_NUMBERS - 1) // FEATURES, FEATURES))
    assert len(calls) == forced
    norm(torch.randn(FEWEST_NUMBERS // FEATURES + 1, FEATURES))
    assert len(calls) == forced + 1
    assert not patch(norm).rows[0].calls_left


def test_what_is_not_covered_is_left_and_named() -> None:
    class Tensorlike(Tensor):
        pass

    several = nn.RMSNorm((3, 4), eps=1e-6)
    assert patch(several).rows[0].reason == "its weight is torch.float32 with 2 dimensions"
    assert patch(nn.RMSNorm(4)).rows[0].reason == "its eps depends on the dtype of its input"
    double = make(LlamaRMSNorm, torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        assert "no kernel for torch.float64 on cpu" in patch(double).rows[0].reason
    finally:
        torch.set_default_dtype(torch.float32)
    norm, x = make(LlamaRMSNorm), torch.randn(ROWS, FEATURES)
    expected = norm(x)
    patch(norm)
    assert torch.equal(norm(hidden_states=x), expected)
    assert torch.equal(norm(x.as_subclass(Tensorlike)).as_subclass(Tensor), expected)
    assert list(patch(norm).rows[0].calls_left) == [
        "called with its input by name",
        "called with a Tensorlike of torch.float32, not with rows of plain floating-point numbers",
    ]


def test_layer_norms_stay_on_the_kernel_of_pytorch() -> None:
    assert patch(nn.LayerNorm(8)).rows == ()


def test_classes_with_another_forward_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)  # type: ignore[no-any-return]

    class Renamed(LlamaRMSNorm):
        pass

    assert patch(make(Doubled)).rows == ()
    assert patch(make(Renamed)).counts["fused"] == 1
    with monkeypatch.context() as context:
        context.setattr(LlamaRMSNorm, "forward", lambda self, x: x)
        assert norm_kind(LlamaRMSNorm) is None
    assert norm_kind(LlamaRMSNorm) is not None


def test_hooks_run() -> None:
    model, seen = llama(), []
    patch(model)
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in fused_modules(model).values()]
    model(**text(4, 100))
    assert set(fused_modules(model).values()) == set(seen)
    for handle in handles:
        handle.remove()


def test_accelerate_hooks_keep_a_norm_out() -> None:
    norm = make(LlamaRMSNorm)
    accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    row = patch(norm).rows[0]
    assert row.action == "left" and "replaced on the instance" in row.reason


def test_compiles_as_one_graph() -> None:
    norm = make(LlamaRMSNorm)
    expected = run_norm(norm)
    patch(norm)
    assert worst_error(run_norm(torch.compile(norm, fullgraph=True, backend="aot_eager")), expected) <= TOLERANCE


def through_pickle(norm: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(norm))
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_stay_patched(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    norm = make(LlamaRMSNorm)
    patch(norm)
    copied = duplicate(norm)
    assert type(copied) is type(norm)
    assert worst_error(run_norm(copied), run_norm(norm)) == 0.0
    assert unpatch(copied) == 1 and type(copied) is LlamaRMSNorm
