"""The CUDA backend: prepares addresses and sizes for the kernels in ``csrc/cuda``, which ``nvcc`` compiles at install.

What it takes comes before Triton:

* quantize and dequantize always. Both backends move each byte once; these kernels need no compilation at run time.
* lora_linear for a 4-bit weight and very few tokens (:data:`PREFERRED_TOKENS`), as in generation; for one token a group
  of large ones (:data:`LEAST_GROUP_ROWS`).

The native module is loaded when the first tensor on a GPU arrives. Where it cannot be used every operation says so
through :func:`unavailable_reason`, and Triton runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import QuantizedTensor, codebook
from peftkern.formats.quantized_tensor import FOUR_BIT_FORMATS, block_count, has_whole_blocks
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.lora_linear_group import Member
from peftkern.ops.quantize import assemble, dynamic_grid, four_bit_bounds, quantize_scales

MAX_TOKENS = 16
"""Tokens up to which lora_linear can run here; kMaxFewTokens of csrc/cuda/kernels.h."""

PREFERRED_TOKENS = {torch.float32: MAX_TOKENS, torch.bfloat16: 4, torch.float16: 4}
"""Tokens up to which it does, without being forced.

On an H100, 4096 x 4096 in bfloat16, these take 18, 21, 26, 39 and 56 us for 1, 2, 4, 8 and 16 tokens, and Triton's
kernel 27 for any number of them, its tensor cores taking them all at once; 14336 x 4096: 31, 45, 56, 93 and 142 against
62 to 71. Tensor cores do not multiply in float32.
"""

LEAST_GROUP_ROWS = 4096
"""Outputs of every member of a group from which on its members run here one by one for a single token.

On an H100 gate and up of Llama-3-8B (twice 14336 x 4096) take 31 us each, and together 115 us on Triton. For q, k and v
(4096, 1024 and 1024) one launch of Triton's takes as long as three of these.
"""

MAX_ADAPTERS = 4
"""kMaxAdapters of csrc/cuda/kernels.h."""

_ALIGNMENT = 16
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ENCODING_CODE = {"nf4": 3, "fp4": 3, "int8_blockwise": 4, "int8": 5}
"""As in csrc/include/peftkern: number.h and weight.h."""


# ---- what is there


@cache
def _load() -> tuple[Any, str | None]:
    """The native module, or why there is none."""
    try:
        from peftkern import _cuda
    except ImportError as error:
        return None, f"the CUDA module is not built or does not load ({error}); install nvcc and reinstall"
    return _cuda, None


@cache
def _device_objection(index: int) -> str | None:
    try:
        _load()[0].check_device(index)
    except RuntimeError as error:
        return f"the CUDA module, built for sm_{', sm_'.join(architectures())}, cannot be used ({error})"
    return None


def unavailable_reason(device: int = 0) -> str | None:
    """Why the native module cannot be used on this GPU, or ``None``."""
    native, objection = _load()
    return objection if native is None else _device_objection(device)


def available(device: int = 0) -> bool:
    """Whether the native module is built, loads, and has kernels for this GPU."""
    return unavailable_reason(device) is None


def architectures() -> list[str]:
    """Compute capabilities that the native module was built for, as in "90"; none where it is not built."""
    native, _ = _load()
    return [] if native is None else str(native.architectures).split()


def _objection(tensor: Tensor) -> str | None:
    return unavailable_reason(tensor.device.index or 0) if tensor.is_cuda else registry.ELSEWHERE


# ---- arguments


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device and current stream of a call."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and aligned; a copy where it is not."""
    tensor = tensor.detach().contiguous()
    return tensor if _is_aligned(tensor) else tensor.clone()


def _aligned_rows(matrix: Tensor) -> Tensor:
    """Rows that are contiguous and aligned, with any distance between them; a copy where they are not."""
    distance = matrix.stride(0) * matrix.element_size() if matrix.shape[0] > 1 else 0
    if matrix.stride(1) == 1 and distance % _ALIGNMENT == 0 and _is_aligned(matrix):
        return matrix
    return _aligned(matrix)


def _scales_tuple(scales: Tensor, weight: QuantizedTensor) -> tuple[tuple[Any, ...], list[Tensor]]:
    nested = weight.double_quantization
    if nested is None:
        return (scales.data_ptr(), 0, 0, 0, 0), [scales]
    book, absmax = codebook("int8_blockwise", scales.device), nested.absmax.contiguous()
    addresses = (scales.data_ptr(), book.data_ptr(), absmax.data_ptr(), nested.offset.data_ptr())
    return (*addresses, nested.block_size.bit_length() - 1), [scales, book, absmax, nested.offset]


def _weight_tuple(weight: QuantizedTensor, rows: int, columns: int) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The weight for the native call, and the tensors that have to live as long as it."""
    packed = weight.packed.contiguous()
    scales, alive = _scales_tuple(weight.scales.contiguous(), weight)
    head = (packed.data_ptr(), _ENCODING_CODE[weight.format], rows, columns)
    if weight.format == "int8":
        return (*head, 0, 0, scales), [packed, *alive]
    book = codebook(weight.format, packed.device)
    return (*head, book.data_ptr(), weight.block_size.bit_length() - 1, scales), [packed, book, *alive]


# ---- quantize, dequantize


def _quantization_tables(format: str, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bounds and codes of a 4-bit format, or the grid of the dynamic one."""
    if format in FOUR_BIT_FORMATS:
        return *four_bit_bounds(format, device), None
    return None, None, dynamic_grid(device) if format == "int8_blockwise" else None


def _quantize_blocks(values: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Flat codes and float32 scales of a contiguous tensor."""
    elements = values.numel()
    code_bytes = block_count(elements, 2) if format in FOUR_BIT_FORMATS else elements
    packed = torch.empty(code_bytes, dtype=torch.int8 if format == "int8" else torch.uint8, device=values.device)
    scales = torch.empty(block_count(elements, block_size), dtype=torch.float32, device=values.device)
    bounds, codes, grid = (_address(table) for table in _quantization_tables(format, values.device))
    _load()[0].quantize(
        _place(values),
        values.data_ptr(),
        _DTYPE_CODE[values.dtype],
        elements,
        block_size,
        _ENCODING_CODE[format],
        bounds,
        codes,
        grid,
        packed.data_ptr(),
        scales.data_ptr(),
    )
    return packed, scales


def _quantize_scale_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _quantize_blocks(values, "int8_blockwise", block_size)


def _supports_quantize(w: Tensor, *_rest: Any) -> str | None:
    return _objection(w)


@registry.register("quantize", "cuda", supports=_supports_quantize)
def quantize(w: Tensor, format: str = "nf4", block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    """See :func:`peftkern.ops.quantize.quantize`. A tensor that is not contiguous is copied first."""
    values = w.detach().contiguous()
    block_size = w.shape[1] if format == "int8" else block_size
    packed, scales = _quantize_blocks(values, format, block_size)
    nested = None
    if double_quant:
        scales, nested = quantize_scales(scales, _quantize_scale_blocks)
    return assemble(w, format, block_size, packed, scales, nested)


def _supports_dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, *_rest: Any) -> str | None:
    objection = _objection(q.packed)
    if objection is not None:
        return objection
    return "float64 results" if dtype == torch.float64 else None


@registry.register("dequantize", "cuda", supports=_supports_dequantize)
def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`peftkern.ops.dequantize.dequantize`."""
    out = torch.empty(q.shape, dtype=q.dtype if dtype is None else dtype, device=q.device)
    shape = tuple(q.shape) if q.format == "int8" else (1, out.numel())
    weight, alive = _weight_tuple(q, *shape)
    _load()[0].dequantize(_place(out), weight, out.data_ptr(), _DTYPE_CODE[out.dtype])
    del alive
    return out


# ---- lora_linear for few tokens


def _supports_lora_linear(
    x: Tensor, weight: Weight, adapters: Adapters | None = None, bias: Tensor | None = None
) -> str | None:
    objection = _objection(x)
    if objection is not None:
        return objection
    if isinstance(weight, Tensor) or weight.format not in FOUR_BIT_FORMATS:
        return registry.NotMeant("a weight that is not 4-bit")
    if x.shape[0] > MAX_TOKENS:
        return registry.NotMeant(f"more than {MAX_TOKENS} tokens")
    if adapters is not None and any(adapters.dropout_p):
        return registry.NotMeant("dropout")
    obstacle = _obstacle(x, weight, adapters, bias)
    preferred = PREFERRED_TOKENS.get(x.dtype, 0)
    if x.shape[0] <= preferred:
        return obstacle
    return registry.NotMeant(obstacle) if obstacle else registry.NotPreferred(f"more than {preferred} tokens")


def _obstacle(x: Tensor, weight: QuantizedTensor, adapters: Adapters | None, bias: Tensor | None) -> str | None:
    """What keeps a call that is meant for these kernels from running on them."""
    if 0 in weight.shape:
        return "an empty weight"
    if not has_whole_blocks(weight.shape, weight.block_size):
        return "rows that are no whole number of blocks"
    if not weight.packed.is_contiguous() or not _is_aligned(weight.packed):
        return "codes that are not contiguous and aligned to 16 bytes"
    factors = [] if adapters is None else [*adapters.lora_A, *adapters.lora_B]
    if len(factors) > 2 * MAX_ADAPTERS:
        return f"more than {MAX_ADAPTERS} adapters"
    tensors = [x, *factors, *([] if bias is None else [bias])]
    return None if all(tensor.dtype in _DTYPE_CODE for tensor in tensors) else "float64"


@registry.register("lora_linear", "cuda", supports=_supports_lora_linear)
def lora_linear(x: Tensor, weight: QuantizedTensor, adapters: Adapters, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.lora_linear.lora_linear_reference` for shapes."""
    rows, columns = weight.shape
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape[0], sum(a.shape[0] for a in adapters.lora_A), dtype=torch.float32, device=x.device)
    if x.shape[0] == 0:
        return y, h
    x = _aligned_rows(x.detach())
    weight_tuple, weight_alive = _weight_tuple(weight, rows, columns)
    adapter_tuples, adapters_alive = _adapter_tuples(adapters.lora_A, adapters.lora_B, adapters.scaling)
    bias = None if bias is None else bias.detach().contiguous()
    _load()[0].few_token_product(
        _place(x),
        x.data_ptr(),
        x.stride(0),
        _DTYPE_CODE[x.dtype],
        x.shape[0],
        weight_tuple,
        adapter_tuples,
        _address(bias),
        0 if bias is None else _DTYPE_CODE[bias.dtype],
        h.data_ptr(),
        y.data_ptr(),
    )
    del weight_alive, adapters_alive
    return y, h


def _supports_lora_linear_group(x: Tensor, members: Sequence[Member], *_rest: Any) -> str | None:
    if x.shape[0] != 1:
        return registry.NotMeant("more than one token")
    if any(member.weight.shape[0] < LEAST_GROUP_ROWS for member in members):
        return registry.NotMeant(f"fewer than {LEAST_GROUP_ROWS} outputs")
    objections = (_supports_lora_linear(x, member.weight, member.adapters, member.bias) for member in members)
    return next((objection for objection in objections if objection is not None), None)


@registry.register("lora_linear_group", "cuda", supports=_supports_lora_linear_group)
def lora_linear_group(x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Tensor]:
    """Forward, one member after the other; see :mod:`peftkern.ops.lora_linear_group` for shapes."""
    results = [lora_linear(x, cast(QuantizedTensor, one.weight), one.adapters, one.bias) for one in members]
    return [y for y, _ in results], torch.cat([h for _, h in results], dim=1)


def _adapter_tuples(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float]
) -> tuple[list[tuple[Any, ...]], list[Tensor]]:
    """The adapters for the native call, and the tensors that have to live as long as it."""
    tuples, alive = [], []
    for A, B, factor in zip(lora_A, lora_B, scaling, strict=True):
        A, B = _aligned(A), B.detach().contiguous()
        tuples.append((A.data_ptr(), _DTYPE_CODE[A.dtype], B.data_ptr(), _DTYPE_CODE[B.dtype], A.shape[0], factor))
        alive += [A, B]
    return tuples, alive
