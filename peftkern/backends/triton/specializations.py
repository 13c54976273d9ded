"""What the shipped kernels are compiled for, found by running the code that launches them on tensors without memory.

Triton compiles a kernel anew for other types and constants of its arguments, and for other divisibilities by 16 of
pointers and numbers. Here it is asked what it would compile for the launches that :func:`launch.recording` has kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.triton.crossover import forced
from peftkern.backends.triton.devices import DeviceKey, assumed
from peftkern.backends.triton.launch import COMPILER_OPTIONS, Call, Launch, recording
from peftkern.backends.triton.paths import FEW_TOKENS, Path
from peftkern.backends.triton.weights import DENSE
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.lora_linear_group import Member


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


EVERY_TILE = (
    Case("nf4 fused", Path.FUSED),
    Case("nf4 staged", Path.STAGED),
    Case("nf4 vendor", Path.VENDOR),
    Case("nf4 few, 1 token", Path.FEW, tokens=1),
    Case("nf4 few", Path.FEW, tokens=FEW_TOKENS),
    Case("nf4 fused float32", Path.FUSED, dtype=torch.float32),
    Case("nf4 staged float32", Path.STAGED, dtype=torch.float32),
    Case("nf4 few float32", Path.FEW, dtype=torch.float32, tokens=FEW_TOKENS),
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
)
"""Every row of :mod:`configurations` and every kernel of a product, with plain weights."""

VARIANTS = (
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


def specializations(
    architecture: int, cases: Iterable[Case] = EVERY_TILE + VARIANTS, tensors: Iterable[TensorCase] = TENSORS
) -> list[Specialization]:
    """What is compiled for ``cases`` and ``tensors`` on ``architecture``, 90 for sm_90; of equals the first."""
    device = DeviceKey(f"sm_{architecture}", divmod(architecture, 10), assumed=True)
    with assumed(device):
        recorded = [(case.name, _record_product(case)) for case in cases]
        recorded += [(tensor.name, _record_tensor(tensor)) for tensor in tensors]
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


def _record_product(case: Case) -> list[Launch]:
    from peftkern.backends.triton.lora_linear import group_backward, group_forward

    members = [_member(case) for _ in range(case.members)]
    x = _empty(case.tokens, case.in_features, dtype=case.dtype)
    need_lora = [[True] * 2 * case.adapters for _ in members]
    with recording() as launches, forced(case.path), _precision(case.precision):
        y, h = group_forward(x, members)
        group_backward(y, x, members, h, True, need_lora)
    return launches


def _record_tensor(case: TensorCase) -> list[Launch]:
    from peftkern.backends.triton.dequantize import dequantize
    from peftkern.backends.triton.quantize import quantize

    with recording() as launches:
        dequantize(quantize(_empty(*case.shape, dtype=case.dtype), case.format, 64, case.double_quantization))
    return launches


def _member(case: Case) -> Member:
    lora_A = [_empty(case.rank, case.in_features, dtype=case.dtype) for _ in range(case.adapters)]
    lora_B = [_empty(case.out_features, case.rank, dtype=case.dtype) for _ in range(case.adapters)]
    seed = torch.tensor(case.seed) if case.dropout else None
    adapters = Adapters(lora_A, lora_B, [2.0] * case.adapters, [case.dropout] * case.adapters, seed)
    return Member(_weight(case), adapters, _empty(case.out_features, dtype=case.dtype) if case.bias else None)


def _weight(case: Case) -> Weight:
    from peftkern.backends.triton.quantize import quantize

    dense = _empty(case.out_features, case.in_features, dtype=case.dtype)
    if case.format is None:
        return dense
    with recording():
        return quantize(dense, case.format, 64, case.double_quantization)


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
