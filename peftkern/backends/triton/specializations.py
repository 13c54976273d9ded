"""What the shipped kernels are compiled for, found by running the code that launches them on tensors without memory.

Triton compiles a kernel anew for other types and constants of its arguments, and for other divisibilities by 16 of
pointers and numbers. Here it is asked what it would compile for the launches that :func:`launch.recording` has kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from peftkern.backends.triton.crossover import forced
from peftkern.backends.triton.devices import DeviceKey, assumed
from peftkern.backends.triton.launch import COMPILER_OPTIONS, Call, Launch, recording
from peftkern.backends.triton.paths import FEW_TOKENS, Path
from peftkern.backends.triton.weights import DENSE
from peftkern.formats import BitMask, SparseIndices
from peftkern.formats.quantized_tensor import block_count
from peftkern.ops.adamw import MOMENT_BLOCK_SIZE, coefficients_of
from peftkern.ops.importance import KINDS
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.lora_linear_group import Member
from peftkern.ops.norm import NormForm
from peftkern.ops.select_top import PASSES, SCORES, Scored


@dataclass(frozen=True)
class Specialization:
    """One kernel as it is compiled. It can be sent to another process.

    Attributes:
        name: what it is compiled for, in words.
        module, kernel: where the ``@triton.jit`` function is.
        signature: Triton types of the parameters; nested tuples of types for tuples; ``"constexpr"`` for constants.
        constants: values of the constants, by position: ``(2,)``, or ``(2, 1)`` for the second entry of a tuple.
        attributes: what is known of the other parameters, by position: ``[["tt.divisibility", 16]]``.
        num_warps, num_stages: as launched.
    """

    name: str
    module: str
    kernel: str
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Options for ``triton.compile``."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILER_OPTIONS}

    @property
    def key(self) -> str:
        """Equal for specializations that compile to the same code."""
        return repr(replace(self, name=""))

    @property
    def named_constants(self) -> dict[str, Any]:
        """Values of the parameters that are constants as a whole."""
        names = list(self.signature)
        return {names[position[0]]: value for position, value in self.constants.items() if len(position) == 1}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of everything that the compiler is given but the architecture.

        Lines of code above a kernel change it as well, because the compiler notes them down.
        """
        return hashlib.sha256(f"{self.source().hash()} {self.options}".encode()).hexdigest()[:16]

    def source(self) -> Any:
        """For ``triton.compile``."""
        from triton.compiler import ASTSource

        kernel = getattr(import_module(self.module), self.kernel)
        return ASTSource(kernel, dict(self.signature), dict(self.constants), dict(self.attributes))


def specialize(name: str, call: Call) -> Specialization:
    """What Triton compiles for ``call``, in the way in which it decides that for itself.

    Raises:
        TypeError: Triton's interpreter is on, which compiles nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = call.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"specialize: {kernel!r} is interpreted and never compiled; unset TRITON_INTERPRET")
    # The decision is the same for every architecture.
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, decisions, _ = bind(*call.arguments, **call.constants)
    _, signature, constants, attributes = kernel._pack_args(backend, {}, bound, decisions, {})
    return Specialization(
        name, kernel.__module__, kernel.__name__, signature, constants, attributes, call.num_warps, call.num_stages
    )


def decoded_weights(specialization: Specialization) -> int:
    """How many weights one turn of a product's loop decodes; 0 for kernels that multiply nothing that they decode."""
    constants = specialization.named_constants
    if constants.get("FORMAT", DENSE) == DENSE or "BLOCK_IN" not in constants:
        return 0
    return int(constants["BLOCK_OUT"] * constants["BLOCK_IN"])


# ---- the shapes that kernels are compiled at


class Recorded(Protocol):
    """Something that kernels are compiled for."""

    @property
    def name(self) -> str:
        """In words."""
        ...

    def record(self) -> list[Launch]:
        """Its launches, on tensors without memory."""
        ...


@dataclass(frozen=True)
class Case:
    """A group of layers, and how it is computed, forward and backward."""

    name: str
    path: Path
    format: str | None = "nf4"  # None: dense
    double_quantization: bool = False
    dtype: torch.dtype = torch.bfloat16
    precision: str = "highest"
    tokens: int = 2048
    in_features: int = 4096
    out_features: int = 4096
    members: int = 1
    adapters: int = 1
    rank: int = 16
    dropout: float = 0.0
    seed: int = 0x5EED_0000_5EED
    bias: bool = False

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.lora_linear import group_backward, group_forward

        members = [_member(self) for _ in range(self.members)]
        x = _empty(self.tokens, self.in_features, dtype=self.dtype)
        need_lora = [[True] * 2 * self.adapters for _ in members]
        with recording() as launches, forced(self.path), _precision(self.precision):
            y, h = group_forward(x, members)
            group_backward(y, x, members, h, True, need_lora)
        return launches


@dataclass(frozen=True)
class SparseCase:
    """A sparse delta: its product, and backward what is needed of both gradients.

    ``results``: dtype of y and dX, which may not be that of x and dY.
    """

    name: str
    entries: int = 167_936
    dtype: torch.dtype = torch.bfloat16
    results: torch.dtype = torch.bfloat16
    values: torch.dtype = torch.float32
    precision: str = "highest"
    tokens: int = 2048
    in_features: int = 4096
    out_features: int = 4096
    need_x: bool = True
    need_values: bool = True

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.sparse_delta import sparse_delta, sparse_delta_backward

        x = _empty(self.tokens, self.in_features, dtype=self.dtype)
        grad = _empty(self.tokens, self.out_features, dtype=self.dtype)
        grad_x = x.to(self.results) if self.need_x else None
        values, indices = _empty(self.entries, dtype=self.values), self._indices()
        with recording() as launches, _precision(self.precision):
            sparse_delta(grad.to(self.results), x, values, indices, 2.0)
            sparse_delta_backward(grad, x, grad_x, values, indices, 2.0, self.need_values)
        return launches

    def _indices(self) -> SparseIndices:
        entries = (_empty(self.entries, dtype=torch.int32) for _ in range(3))
        offsets = (_empty(size + 1, dtype=torch.int64) for size in (self.out_features, self.in_features))
        columns, rows, order = entries
        row_offsets, column_offsets = offsets
        shape = torch.Size((self.out_features, self.in_features))
        return SparseIndices(shape, row_offsets, columns, column_offsets, rows, order)


EVERY_TILE: tuple[Recorded, ...] = (
    Case("nf4 fused", Path.FUSED),
    Case("nf4 staged", Path.STAGED),
    Case("nf4 vendor", Path.VENDOR),
    Case("nf4 few, 1 token", Path.FEW, tokens=1),
    Case("nf4 few", Path.FEW, tokens=FEW_TOKENS),
    Case("nf4 fused float32", Path.FUSED, dtype=torch.float32),
    Case("nf4 staged float32", Path.STAGED, dtype=torch.float32),
    Case("nf4 few float32", Path.FEW, dtype=torch.float32, tokens=FEW_TOKENS),
    Case("nf4 few float32, 1 token", Path.FEW, dtype=torch.float32, tokens=1),
    Case("nf4 few, 1 token, dropout", Path.FEW, dropout=0.1, tokens=1),
    Case("nf4 few float32, 1 token, dropout", Path.FEW, dtype=torch.float32, dropout=0.1, tokens=1),
    Case("nf4 vendor float32", Path.VENDOR, dtype=torch.float32),
    Case("nf4 fused rank 128", Path.FUSED, rank=128),
    *(
        Case(
            f"nf4 {path}{name}, dropout",
            path,
            dtype=dtype,
            dropout=0.1,
            tokens=FEW_TOKENS if path == Path.FEW else 2048,
        )
        for path in Path
        for name, dtype in (("", torch.bfloat16), (" float32", torch.float32))
    ),
    SparseCase("sparse"),
    SparseCase("sparse float32", dtype=torch.float32, results=torch.float32),
    SparseCase("sparse, not copied", entries=64),
    SparseCase("sparse, not copied, float32", entries=64, dtype=torch.float32, results=torch.float32),
)
"""Every row of :mod:`configurations` and every kernel of a product, with plain weights."""

VARIANTS: tuple[Recorded, ...] = (
    Case("nf4 nested, 3 members, fused", Path.FUSED, double_quantization=True, members=3),
    Case("nf4 nested, 3 members, staged", Path.STAGED, double_quantization=True, members=3),
    Case("nf4 nested, 3 members, few", Path.FEW, double_quantization=True, members=3, tokens=8),
    Case("nf4 fused float16", Path.FUSED, dtype=torch.float16),
    Case("nf4 fused tf32", Path.FUSED, dtype=torch.float32, precision="high"),
    Case("nf4 2 adapters, dropout, bias, fused", Path.FUSED, adapters=2, dropout=0.1, bias=True),
    Case("nf4 3 members, dropout, bias, few", Path.FEW, members=3, dropout=0.1, bias=True, tokens=8),
    Case("int8 fused", Path.FUSED, format="int8"),
    Case("int8 few", Path.FEW, format="int8", tokens=8),
    Case("int8 staged", Path.STAGED, format="int8"),
    Case("8-bit blockwise fused", Path.FUSED, format="int8_blockwise"),
    Case("8-bit blockwise few", Path.FEW, format="int8_blockwise", tokens=8),
    Case("8-bit blockwise staged", Path.STAGED, format="int8_blockwise"),
    Case("dense", Path.STAGED, format=None),
    Case("dense few", Path.FEW, format=None, tokens=8),
    Case("nf4 odd sizes, fused", Path.FUSED, tokens=1003, in_features=4032, out_features=1001),
    Case("nf4 odd rows, fused", Path.FUSED, tokens=1003, in_features=1001, out_features=1001),
    Case("dense odd sizes", Path.STAGED, format=None, tokens=1003, in_features=1001, out_features=1001),
    SparseCase("sparse float16", dtype=torch.float16, results=torch.float16),
    SparseCase("sparse tf32", dtype=torch.float32, results=torch.float32, precision="high"),
    SparseCase("sparse, float32 results", results=torch.float32),
    SparseCase("sparse, bfloat16 values", values=torch.bfloat16),
    SparseCase("sparse, 1 token", tokens=1),
    SparseCase("sparse, odd sizes", entries=10_001, tokens=1003, in_features=1001, out_features=1001),
    SparseCase("sparse, dX alone", need_values=False),
    SparseCase("sparse, dS alone", need_x=False),
)
"""What else the kernels of a product are compiled for: formats, dtypes, groups, options, masks."""


@dataclass(frozen=True)
class TensorCase:
    """A tensor that is quantized and dequantized."""

    name: str
    format: str
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = (4096, 4096)
    double_quantization: bool = False

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.dequantize import dequantize
        from peftkern.backends.triton.quantize import quantize

        with recording() as launches:
            dequantize(quantize(_empty(*self.shape, dtype=self.dtype), self.format, 64, self.double_quantization))
        return launches


TENSORS = (
    TensorCase("nf4", "nf4"),
    TensorCase("nf4 nested", "nf4", double_quantization=True),
    TensorCase("nf4 float32", "nf4", torch.float32),
    TensorCase("nf4 odd size", "nf4", shape=(1001, 1003)),
    TensorCase("nf4 beyond 2^31 elements", "nf4", shape=(1 << 17, 1 << 15)),
    TensorCase("8-bit blockwise", "int8_blockwise"),
    TensorCase("int8", "int8"),
    TensorCase("int8 odd size", "int8", shape=(1001, 1003)),
)
"""What the kernels that quantize and dequantize are compiled for."""


@dataclass(frozen=True)
class MaskedCase:
    """A weight under a bit mask."""

    name: str
    format: str | None = None  # None: dense
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = (4096, 4096)

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.masked_dequantize import masked_dequantize

        weight = _quantized(_empty(*self.shape, dtype=self.dtype), self.format)
        with recording() as launches:
            masked_dequantize(weight, _mask(self.shape), _empty(*self.shape, dtype=self.dtype))
        return launches


@dataclass(frozen=True)
class GateCase:
    """The gate of a SwiGLU or GeGLU block, forward and backward."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.silu_mul import silu_mul, silu_mul_backward

        gate = _empty(2048, 14336, dtype=self.dtype)
        with recording() as launches:
            y = silu_mul(gate, gate, self.activation)
            silu_mul_backward(y, gate, gate, True, True, self.activation, (False, False))
        return launches


@dataclass(frozen=True)
class NormCase:
    """A norm of rows, forward and backward: ``layer`` with mean, bias and their gradients, or as Llama has it."""

    name: str
    layer: bool = False
    residual: bool = True
    features: int = 4096
    dtype: torch.dtype = torch.bfloat16

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.norm import norm, norm_backward

        x, weight = _empty(2048, self.features, dtype=self.dtype), _empty(self.features, dtype=self.dtype)
        form = NormForm(1e-6, centered=self.layer, round_before_weight=not self.layer)
        residual, bias = x if self.residual else None, weight if self.layer else None
        with recording() as launches:
            y, _total, mean, rstd = norm(x, residual, weight, bias, form)
            norm_backward(y, residual, x, weight, mean, rstd, form, True, self.layer, self.layer)
        return launches


@dataclass(frozen=True)
class RotaryCase:
    """Queries and keys of grouped-query attention turned, and turned back."""

    name: str
    interleaved: bool = False
    rotary_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.rotary import rotary

        states = [_empty(1, 2048, heads, 128, dtype=self.dtype).transpose(1, 2) for heads in (32, 8)]
        angles = _empty(1, 2048, self.rotary_dim, dtype=self.dtype)
        with recording() as launches:
            for inverse in (False, True):
                rotary(states, angles, angles, self.interleaved, inverse)
        return launches


@dataclass(frozen=True)
class UpdateCase:
    """An update by AdamW. ``scale``: ``"rows"``, ``"mask"`` or ``None``. ``aged``: entries have ages.

    ``probe``: on trial; of a parameter without ages it is tried with no moments as well.
    """

    name: str
    bits: int
    dtype: torch.dtype = torch.bfloat16
    scale: str | None = None
    aged: bool = False
    shape: tuple[int, int] = (4096, 4096)
    probe: bool = False

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.adamw import adamw, adamw_8bit

        parameter = _empty(*self.shape, dtype=self.dtype)
        age = _empty(*self.shape, dtype=torch.int32) if self.aged else None
        coefficients, age = coefficients_of(parameter.device, 1e-4, (0.9, 0.999), 1e-8, 0.01, 3 if age is None else age)
        scales = {"rows": _empty(self.shape[0], dtype=torch.float32), "mask": _mask(self.shape), None: None}
        settings = (coefficients, age, scales[self.scale])
        with recording() as launches:
            if self.bits == 8:
                codes = parameter.to(torch.uint8)
                absmax = _empty(block_count(parameter.numel(), MOMENT_BLOCK_SIZE), dtype=torch.float32)
                adamw_8bit(parameter, parameter, codes, codes, absmax, absmax, *settings, probe=self.probe)
            else:
                adamw(parameter, parameter, parameter.float(), parameter.float(), *settings, probe=self.probe)
                if self.probe and age is None:
                    adamw(parameter, parameter, None, None, *settings, probe=True)
        return launches


@dataclass(frozen=True)
class SelectCase:
    """The passes of a selection over one tensor, and what is made of the last one."""

    name: str
    score: str
    dtype: torch.dtype = torch.bfloat16
    elements: int = 1 << 24
    excluded: int = 0

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.select_top import score_collect, score_histogram

        a, other = _empty(self.elements, dtype=self.dtype), None
        if SCORES[self.score]:
            other = _empty(4096 if self.score == "outer" else self.elements, dtype=self.dtype)
        exclude = _empty(self.excluded, dtype=torch.int64) if self.excluded else None
        entry = Scored(self.score, a, other, exclude)
        with recording() as launches:
            for shift, bits in PASSES:
                score_histogram(entry, shift, bits, 0)
            score_collect(entry, 0, 0, 1000)
        return launches


@dataclass(frozen=True)
class ImportanceCase:
    """Sums of one kind: of entries, over rows, and over everything."""

    name: str
    kind: str
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = (4096, 1 << 15)

    def record(self) -> list[Launch]:
        """See :class:`Recorded`."""
        from peftkern.backends.triton.importance import accumulate_importance, importance_dot, probe_dot

        gradient = _empty(*self.shape, dtype=self.dtype)
        other = gradient if KINDS[self.kind] else None
        with recording() as launches:
            for shape in (self.shape, self.shape[:1]):
                accumulate_importance(_empty(*shape, dtype=torch.float32), gradient, self.kind, other)
            if other is not None:
                importance_dot(gradient, other)
                probe_dot(gradient, other, gradient)
        return launches


ENTRIES: tuple[Recorded, ...] = (
    UpdateCase("AdamW", 32),
    UpdateCase("8-bit AdamW", 8),
    UpdateCase("AdamW on trial", 32, probe=True),
    UpdateCase("8-bit AdamW on trial", 8, probe=True),
    SelectCase("select by magnitude", "magnitude"),
    ImportanceCase("importance, sum", "sum"),
    MaskedCase("masked dense"),
    GateCase("gate"),
    NormCase("rms norm, residual"),
    NormCase("rms norm", residual=False),
    NormCase("layer norm", layer=True),
    RotaryCase("rotary"),
)
"""Every kernel that works entry by entry."""

ENTRY_VARIANTS: tuple[Recorded, ...] = (
    UpdateCase("AdamW float32, rows, ages", 32, torch.float32, "rows", True),
    UpdateCase("AdamW, mask, odd size", 32, scale="mask", shape=(1001, 1003)),
    UpdateCase("AdamW beyond 2^31 elements", 32, scale="mask", aged=True, shape=(1 << 17, 1 << 15)),
    UpdateCase("8-bit AdamW float32, rows, ages", 8, torch.float32, "rows", True),
    UpdateCase("8-bit AdamW, mask, odd size", 8, scale="mask", shape=(1001, 1003)),
    UpdateCase("8-bit AdamW beyond 2^31 elements", 8, scale="mask", shape=(1 << 17, 1 << 15)),
    UpdateCase("AdamW on trial, mask, ages, odd size", 32, scale="mask", aged=True, shape=(1001, 1003), probe=True),
    UpdateCase("8-bit AdamW on trial, rows", 8, torch.float32, "rows", probe=True),
    SelectCase("select by outer product", "outer", elements=1 << 14),
    SelectCase("select by difference, excluding", "difference", torch.float32, excluded=1000),
    SelectCase("select by product, odd size", "product", elements=1001),
    SelectCase("select beyond 2^31 elements", "value", elements=1 << 32, excluded=1 << 20),
    ImportanceCase("importance, square, float32", "square", torch.float32, (1001, 1003)),
    ImportanceCase("importance, product", "product"),
    ImportanceCase("importance beyond 2^31 elements", "product", shape=(1 << 17, 1 << 15)),
    MaskedCase("masked nf4", "nf4"),
    MaskedCase("masked int8, float32", "int8", torch.float32),
    MaskedCase("masked dense, odd size", shape=(1001, 1003)),
    GateCase("gate float32", torch.float32),
    NormCase("rms norm float32, odd", features=577, dtype=torch.float32),
    RotaryCase("rotary, interleaved part", interleaved=True, rotary_dim=64),
    GateCase("gate by gelu", activation="gelu"),
    GateCase("gate by gelu with tanh", activation="gelu_tanh"),
)
"""What else those are compiled for."""


def specializations(
    architecture: int,
    cases: Iterable[Recorded] = EVERY_TILE + VARIANTS,
    tensors: Iterable[Recorded] = TENSORS + ENTRIES + ENTRY_VARIANTS,
) -> list[Specialization]:
    """What is compiled for ``cases`` and ``tensors`` on ``architecture``, 90 for sm_90; of equals the first."""
    device = DeviceKey(f"sm_{architecture}", divmod(architecture, 10), assumed=True)
    with assumed(device):
        recorded = [(case.name, case.record()) for case in (*cases, *tensors)]
    found: dict[str, Specialization] = {}
    for name, launches in recorded:
        for one in _named(name, launches):
            found.setdefault(one.key, one)
    return list(found.values())


def _named(case: str, launches: Sequence[Launch]) -> Iterator[Specialization]:
    """Specializations of the launches of one case; the second different one of a kernel gets a number, and so on."""
    distinct: dict[str, Specialization] = {}
    count: Counter[str] = Counter()
    for launched in launches:
        assert launched.call is not None
        kernel = launched.kernel.removesuffix("_kernel")
        one = specialize(f"{case}: {kernel}", launched.call)
        if one.key in distinct:
            continue
        count[kernel] += 1
        number = f" {count[kernel]}" if count[kernel] > 1 else ""
        distinct[one.key] = replace(one, name=one.name + number)
    yield from distinct.values()


def _member(case: Case) -> Member:
    lora_A = [_empty(case.rank, case.in_features, dtype=case.dtype) for _ in range(case.adapters)]
    lora_B = [_empty(case.out_features, case.rank, dtype=case.dtype) for _ in range(case.adapters)]
    seed = torch.tensor(case.seed) if case.dropout else None
    adapters = Adapters(lora_A, lora_B, [2.0] * case.adapters, [case.dropout] * case.adapters, seed)
    return Member(_weight(case), adapters, _empty(case.out_features, dtype=case.dtype) if case.bias else None)


def _weight(case: Case) -> Weight:
    dense = _empty(case.out_features, case.in_features, dtype=case.dtype)
    return _quantized(dense, case.format, case.double_quantization)


def _quantized(dense: Tensor, format: str | None, double_quantization: bool = False) -> Weight:
    from peftkern.backends.triton.quantize import quantize

    if format is None:
        return dense
    with recording():
        return quantize(dense, format, 64, double_quantization)


def _mask(shape: tuple[int, int]) -> BitMask:
    return BitMask(_empty(shape[0], -(-shape[1] // 8), dtype=torch.uint8), torch.Size(shape))


def _empty(*shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
