"""The CPU backend: prepares addresses, sizes and strides for the native kernels in ``csrc/cpu``.

The native module is chosen apart by instruction set at run time; ``PEFTKERN_CPU_ISA`` forces one of
``generic``, ``avx2``, ``avx512``, ``avx512bf16``, ``avx512fp16``. Without it (no compiler at install time) every
operation says so through :func:`unavailable_reason`, and the reference runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import BitMask, QuantizedTensor, codebook
from peftkern.formats.quantized_tensor import FOUR_BIT_FORMATS, block_count
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.quantize import assemble, dynamic_grid, four_bit_bounds, quantize_scales
from peftkern.ops.silu_mul import ACTIVATIONS, NOTHING_FREE

try:
    from peftkern import _cpu

    native: Any = _cpu
    _IMPORT_ERROR: str | None = None
except ImportError as error:
    native = None
    _IMPORT_ERROR = f"the native module is not built or does not load ({error}); install a C++17 compiler and reinstall"

ENVIRONMENT_VARIABLE = "PEFTKERN_CPU_ISA"

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Codes of dtypes and of precisions, as in csrc/include/peftkern/number.h and csrc/cpu/kernels.h."""
_DTYPE_CODE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_ENCODING_CODE = {"nf4": 3, "fp4": 3, "int8_blockwise": 4, "int8": 5}
_NO_DROPOUT = (0, 0, 0.0)
_NO_MASK = (0, 0)


# ---- what is there


def available() -> bool:
    """Whether the native module is built and loads."""
    return native is not None


def unavailable_reason() -> str | None:
    """Why the native module cannot be used, or ``None``."""
    return _IMPORT_ERROR


@lru_cache(maxsize=1)
def instruction_sets() -> dict[str, dict[str, Any]]:
    """``supported``, ``native_bfloat16`` and ``native_float16`` of each built set, the most capable first."""
    return {} if native is None else {row["name"]: row for row in native.instruction_sets()}


def isa_names() -> list[str]:
    """Instruction sets that were built."""
    return list(instruction_sets())


def supported_isas() -> list[str]:
    """Instruction sets that were built and run on this processor, the most capable first."""
    return [name for name, row in instruction_sets().items() if row["supported"]]


@lru_cache(maxsize=8)
def _resolve_isa(name: str | None) -> str:
    return str(native.best_instruction_set(name))


def chosen_isa() -> str:
    """The instruction set in use.

    Raises:
        BackendError: the native module is missing, or ``PEFTKERN_CPU_ISA`` names a set that cannot run here.
    """
    if native is None:
        raise registry.BackendError(f"cpu backend: {_IMPORT_ERROR}")
    try:
        return _resolve_isa(os.environ.get(ENVIRONMENT_VARIABLE) or None)
    except ValueError as error:
        raise registry.BackendError(str(error)) from None


def thread_source() -> str:
    """The OpenMP library whose threads the kernels run on (PyTorch's own), or ``"std::thread"``."""
    return "" if native is None else str(native.thread_source())


def product_precision(dtype: torch.dtype, isa: str) -> int:
    """The arithmetic of a product with activations of ``dtype``: FLOAT32, BFLOAT16 or FLOAT16.

    float32 activations follow ``torch.get_float32_matmul_precision()``: "highest" is float32 throughout; "high" admits
    float16 operands where the processor multiplies them (their 11-bit mantissa is TF32's, which "high" stands for);
    "medium" admits bfloat16 ones as well. 16-bit activations take the fastest that the processor has and that keeps
    their own precision. In bfloat16 that goes for factors of adapters, and for h and g where they are multiplied on.
    """
    row = instruction_sets()[isa]
    allowed = torch.get_float32_matmul_precision() if dtype == torch.float32 else str(dtype)
    if row["native_float16"] and allowed != "highest":
        return FLOAT16
    if row["native_bfloat16"] and allowed in ("medium", "torch.bfloat16"):
        return BFLOAT16
    return FLOAT32


# ---- arguments


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with its columns next to each other, as the kernels read it; rows may have any stride."""
    matrix = matrix.resolve_neg()
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


_HUGE_PAGES_FROM_BYTES = 4 << 20


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result. Large ones ask for huge pages: page faults cost more than the kernels that fill them.

    ``peftkern bench quantize`` shows what they cost the peer, which does not ask.
    """
    # The device is named: a default device may be set, and the kernels write to this memory.
    result = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if result.nbytes >= _HUGE_PAGES_FROM_BYTES:
        native.advise_huge_pages(result.data_ptr(), result.nbytes)
    return result


def _row_stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).resolve_neg().contiguous()


@lru_cache(maxsize=8)
def _codebook(format: str) -> Tensor:
    return codebook(format).to(torch.float32).contiguous()


def _block_shift(block_size: int) -> int:
    return block_size.bit_length() - 1


def _dense_tuple(matrix: Tensor) -> tuple[Any, ...]:
    code = _DTYPE_CODE[matrix.dtype]
    return (matrix.data_ptr(), code, *matrix.shape, _row_stride(matrix), 0, -1, 0, 0, 0, 0.0, 0)


def _weight_tuple(weight: Weight, exact_int8: bool = False) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The weight for the native call, and the tensors that have to live as long as it.

    The scales of int8 are divided by 127 here, unless ``exact_int8`` leaves that to a kernel that rounds twice.
    """
    if isinstance(weight, Tensor):
        matrix = _rows(weight)
        return _dense_tuple(matrix), [matrix]
    packed, scales = weight.packed.contiguous(), weight.scales.contiguous()
    if weight.format == "int8":
        scales = scales if exact_int8 else scales / 127.0
        code = _ENCODING_CODE[weight.format]
        return (packed.data_ptr(), code, *weight.shape, 0, 0, -1, scales.data_ptr(), 0, 0, 0.0, 0), [packed, scales]
    book = _codebook(weight.format)
    rows, columns = weight.shape if len(weight.shape) == 2 else (1, weight.shape.numel())
    head = (packed.data_ptr(), _ENCODING_CODE[weight.format], rows, columns, 0, book.data_ptr())
    block = (_block_shift(weight.block_size), scales.data_ptr())
    nested = weight.double_quantization
    if nested is None:
        return (*head, *block, 0, 0, 0.0, 0), [packed, scales, book]
    scale_book, absmax = _codebook("int8_blockwise"), _float32(nested.absmax)
    tail = (scale_book.data_ptr(), absmax.data_ptr(), float(nested.offset), _block_shift(nested.block_size))
    return (*head, *block, *tail), [packed, scales, book, scale_book, absmax]


def _as_it_lies(weight: Weight, mask: BitMask | None) -> Tensor | None:
    """The transpose of a dense weight that is itself a transposed view, as GPT-2's ``Conv1D`` is handed over.

    The product reads it along its other dimension then, and nothing is copied. A mask only lies along the weight.
    """
    if mask is not None or not isinstance(weight, Tensor) or weight.stride(-1) == 1:
        return None
    return weight.t() if weight.stride(0) == 1 else None


def _mask_tuple(mask: BitMask | None) -> tuple[int, int]:
    return _NO_MASK if mask is None else (mask.bits.data_ptr(), mask.bits.shape[1])


def _product(
    activations: Tensor,
    weight: tuple[Any, ...],
    out: Tensor,
    *,
    mask: BitMask | None = None,
    out_mask: BitMask | None = None,
    transposed: bool = False,
    turned: bool = False,
    dropout: tuple[int, int, float] = _NO_DROPOUT,
    weight_dropout: tuple[int, int, float] = _NO_DROPOUT,
    alpha: float = 1.0,
    low_rank: Sequence[tuple[Any, ...]] = (),
    bias: Tensor | None = None,
    precision: int = FLOAT32,
) -> None:
    """``out = alpha * (activations Wᵀ + low-rank terms) + bias``; W itself where ``transposed``.

    ``turned`` takes the activations' transpose. Strides are read off the tensors. W counts where ``mask`` keeps it, and
    ``out`` is zero where ``out_mask`` does not; their bits are contiguous.
    """
    strides = (_row_stride(activations), 1)
    native.product(
        chosen_isa(),
        (activations.data_ptr(), _DTYPE_CODE[activations.dtype], *(strides[::-1] if turned else strides), dropout),
        activations.shape[1] if turned else activations.shape[0],
        weight,
        _mask_tuple(mask),
        weight_dropout,
        transposed,
        alpha,
        list(low_rank),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        _DTYPE_CODE[out.dtype],
        _row_stride(out),
        _mask_tuple(out_mask),
        precision,
        torch.get_num_threads(),
    )


def multiply(activations: Tensor, weight: Weight, out: Tensor) -> None:
    """``out = activations Wᵀ`` without a gradient: [tokens, in_features] and [out_features, in_features].

    Arithmetic and rounding are those of ``lora_linear`` for the activations' dtype; ``out`` may have another one.
    """
    activations = _rows(activations)
    matrix, alive = _weight_tuple(weight)
    _product(activations, matrix, out, precision=product_precision(activations.dtype, chosen_isa()))
    del alive


def _dropout_tuples(adapters: Adapters) -> list[tuple[int, int, float]]:
    seed = 0 if adapters.seed is None else int(adapters.seed)
    return [(seed, index, p) for index, p in enumerate(adapters.dropout_p)]


def supports_values(tensor: Tensor, *_rest: Any) -> str | None:
    """Why kernels that read the elements of ``tensor`` one by one cannot, or ``None``."""
    if native is None:
        return _IMPORT_ERROR
    if tensor.device.type != "cpu":
        return f"tensors are on {tensor.device}"
    return None if tensor.dtype in _DTYPE_CODE else f"{tensor.dtype} tensors"


def values_tuple(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor for the native call; address 0 where there is none."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _DTYPE_CODE[tensor.dtype])


def is_adjacent(tensor: Tensor) -> bool:
    """Whether the numbers of the last dimension lie next to each other."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def adjacent(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with its last dimension's numbers next to each other."""
    tensor = tensor.resolve_neg()
    return tensor if is_adjacent(tensor) else tensor.contiguous()


# ---- quantize, dequantize


@lru_cache(maxsize=8)
def _quantization_tables(format: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bounds and codes of a 4-bit format, or the grid of the dynamic one."""
    if format in FOUR_BIT_FORMATS:
        return *four_bit_bounds(format, torch.device("cpu")), None
    return None, None, dynamic_grid(torch.device("cpu")) if format == "int8_blockwise" else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _quantize_blocks(values: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Flat codes and float32 scales of a contiguous tensor."""
    elements = values.numel()
    code_bytes = block_count(elements, 2) if format in FOUR_BIT_FORMATS else elements
    packed = torch.empty(code_bytes, dtype=torch.int8 if format == "int8" else torch.uint8, device=values.device)
    scales = torch.empty(block_count(elements, block_size), dtype=torch.float32, device=values.device)
    bounds, codes, grid = (_address(table) for table in _quantization_tables(format))
    native.quantize(
        chosen_isa(),
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
        torch.get_num_threads(),
    )
    return packed, scales


def _quantize_scale_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _quantize_blocks(values, "int8_blockwise", block_size)


def _supports_quantize(w: Tensor, *_rest: Any) -> str | None:
    if native is None:
        return _IMPORT_ERROR
    return None if w.device.type == "cpu" else f"w is on {w.device}"


@registry.register("quantize", "cpu", supports=_supports_quantize)
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
    if native is None:
        return _IMPORT_ERROR
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    return "float64 results" if dtype == torch.float64 else None


@registry.register("dequantize", "cpu", supports=_supports_dequantize)
def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`peftkern.ops.dequantize.dequantize`."""
    out = _new(q.packed, *q.shape, dtype=q.dtype if dtype is None else dtype)
    weight, alive = _weight_tuple(q, exact_int8=True)
    native.dequantize(
        chosen_isa(), weight, out.numel(), q.block_size, out.data_ptr(), _DTYPE_CODE[out.dtype], torch.get_num_threads()
    )
    del alive
    return out


# ---- lora_linear


def _objection(tensor: Tensor, weight: Weight) -> str | None:
    if native is None:
        return _IMPORT_ERROR
    if tensor.device.type != "cpu":
        return f"tensors are on {tensor.device}"
    if tensor.dtype not in _DTYPE_CODE:
        return f"{tensor.dtype} activations"
    if isinstance(weight, Tensor) and weight.dtype not in _DTYPE_CODE:
        return f"a {weight.dtype} weight"
    if 0 in weight.shape:
        return "an empty weight"
    if isinstance(weight, QuantizedTensor) and weight.format not in _ENCODING_CODE:
        return f"format {weight.format}"
    return None


def _supports_forward(x: Tensor, weight: Weight, *_rest: Any) -> str | None:
    return _objection(x, weight)


def _supports_backward(grad: Tensor, _x: Tensor | None, weight: Weight, *_rest: Any) -> str | None:
    return _objection(grad, weight)


@registry.register("lora_linear", "cpu", supports=_supports_forward)
def lora_linear(x: Tensor, weight: Weight, adapters: Adapters, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.lora_linear.lora_linear_reference` for shapes."""
    return _forward(x, weight, None, adapters, bias)


def _forward(
    x: Tensor, weight: Weight, mask: BitMask | None, adapters: Adapters, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = _rows(x)
    splits, masks = adapters.splits(), _dropout_tuples(adapters)
    y = _new(x, x.shape[0], weight.shape[0])
    h = x.new_empty(x.shape[0], splits[-1].stop if splits else 0, dtype=torch.float32)
    if x.shape[0] == 0:
        return y, h
    turned = _as_it_lies(weight, mask)
    precision = _factor_precision(x.dtype)
    low_rank, alive = [], []
    for index, columns in enumerate(splits):
        lora_B = _float32(adapters.lora_B[index] if turned is None else adapters.lora_B[index].t())
        lora_A = adapters.lora_A[index].detach().to(torch.bfloat16 if precision == BFLOAT16 else torch.float32)
        lora_A = lora_A.resolve_neg().contiguous()
        factor_options: dict[str, Any] = {"alpha": adapters.scaling[index], "precision": precision}
        _product(x, _dense_tuple(lora_A), h[:, columns], dropout=masks[index], **factor_options)
        rank = columns.stop - columns.start
        low_rank.append((h[:, columns].data_ptr(), _row_stride(h), *_factor(lora_B, rank), _NO_DROPOUT))
        alive.append(lora_B)
    weight_tuple, weight_alive = _weight_tuple(weight if turned is None else turned)
    options: dict[str, Any] = {"low_rank": low_rank, "precision": product_precision(x.dtype, chosen_isa())}
    bias = None if bias is None else _float32(bias)
    _product(x, weight_tuple, y, mask=mask, transposed=turned is not None, bias=bias, **options)
    del alive, weight_alive
    return y, h


def _factor_precision(dtype: torch.dtype) -> int:
    """Of products of activations with a factor or with what became of one: bfloat16 where the activations are."""
    precision = product_precision(dtype, chosen_isa())
    return precision if precision == BFLOAT16 and dtype == torch.bfloat16 else FLOAT32


def _factor(matrix: Tensor, rank: int) -> tuple[int, int, int]:
    return matrix.data_ptr(), _row_stride(matrix), rank


@registry.register("lora_linear_backward", "cpu", supports=_supports_backward)
def lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.lora_linear.lora_linear_backward_reference` for shapes."""
    return _backward(grad, x, weight, None, adapters, h, need_x, need_lora)


def _backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    mask: BitMask | None,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    if grad.shape[0] == 0:
        zeros = [
            [p.new_zeros(p.shape) if need else None for p, need in pairs] for pairs in _wanted(adapters, need_lora)
        ]
        return grad.new_empty(0, weight.shape[1]) if need_x else None, zeros[0], zeros[1]
    grad = _rows(grad)
    g = _inner_gradients(grad, adapters) if need_x or any(need_lora[: len(adapters)]) else None
    grad_x = None
    if need_x:
        assert g is not None
        grad_x = _input_gradient(grad, weight, mask, adapters, g)
    return grad_x, *_adapter_gradients(grad, x, adapters, g, h, need_lora)


def _adapter_gradients(
    grad: Tensor, x: Tensor | None, adapters: Adapters, g: Tensor | None, h: Tensor, need_lora: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Of every A, which take x and g, and of every B."""
    count = len(adapters)
    need_A, need_B = need_lora[:count], need_lora[count:]
    grad_A: list[Tensor | None] = [None] * count
    grad_B: list[Tensor | None] = [None] * count
    masks = _dropout_tuples(adapters)
    for index, columns in enumerate(adapters.splits()):
        if need_A[index]:
            assert g is not None and x is not None
            grad_A[index] = _skinny_gradient(g[:, columns], x, masks[index]).to(adapters.lora_A[index].dtype)
        if need_B[index]:
            grad_B_turned = _skinny_gradient(h[:, columns], grad, _NO_DROPOUT)
            grad_B[index] = grad_B_turned.t().to(adapters.lora_B[index].dtype).contiguous()
    return grad_A, grad_B


def _wanted(adapters: Adapters, need_lora: Sequence[bool]) -> list[list[tuple[Tensor, bool]]]:
    count = len(adapters)
    need_A, need_B = need_lora[:count], need_lora[count:]
    return [list(zip(adapters.lora_A, need_A, strict=True)), list(zip(adapters.lora_B, need_B, strict=True))]


def _inner_gradients(grad: Tensor, adapters: Adapters) -> Tensor:
    """g = scaling * dy B of all adapters, side by side: [tokens, Σr] float32."""
    splits = adapters.splits()
    g = grad.new_empty(grad.shape[0], splits[-1].stop if splits else 0, dtype=torch.float32)
    for index, columns in enumerate(splits):
        lora_B = _float32(adapters.lora_B[index])
        options: dict[str, Any] = {"alpha": adapters.scaling[index], "precision": _factor_precision(grad.dtype)}
        _product(grad, _dense_tuple(lora_B), g[:, columns], transposed=True, **options)
    return g


def _input_gradient(grad: Tensor, weight: Weight, mask: BitMask | None, adapters: Adapters, g: Tensor) -> Tensor:
    grad_x = _new(grad, grad.shape[0], weight.shape[1])
    turned = _as_it_lies(weight, mask)
    factors = [_float32(lora_A if turned is None else lora_A.t()) for lora_A in adapters.lora_A]
    low_rank = [
        (g[:, columns].data_ptr(), _row_stride(g), *_factor(factor, columns.stop - columns.start), dropped)
        for columns, factor, dropped in zip(adapters.splits(), factors, _dropout_tuples(adapters), strict=True)
    ]
    weight_tuple, weight_alive = _weight_tuple(weight if turned is None else turned)
    options: dict[str, Any] = {"low_rank": low_rank, "precision": product_precision(grad.dtype, chosen_isa())}
    _product(grad, weight_tuple, grad_x, mask=mask, transposed=turned is None, **options)
    del weight_alive
    return grad_x


def _skinny_gradient(left: Tensor, right: Tensor, dropout: tuple[int, int, float]) -> Tensor:
    """``leftᵀ dropout(right)``, [r, features] float32, the sum running over tokens."""
    right = _rows(right)
    out = left.new_empty(left.shape[1], right.shape[1])
    # panels under dropout are float32
    precision = _factor_precision(right.dtype) if dropout[2] == 0.0 else FLOAT32
    options: dict[str, Any] = {"weight_dropout": dropout, "precision": precision}
    _product(left, _dense_tuple(right), out, transposed=True, turned=True, **options)
    return out


# ---- masked_linear


def _contiguous_mask(mask: BitMask) -> BitMask:
    return BitMask(mask.bits.contiguous(), mask.shape, mask.pattern)


@registry.register("masked_linear", "cpu", supports=_supports_forward)
def masked_linear(
    x: Tensor, weight: Weight, mask: BitMask, adapters: Adapters, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.masked_linear.masked_linear_reference` for shapes."""
    return _forward(x, weight, _contiguous_mask(mask), adapters, bias)


@registry.register("masked_linear_backward", "cpu", supports=_supports_backward)
def masked_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    mask: BitMask,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_weight: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.masked_linear.masked_linear_backward_reference` for shapes."""
    mask = _contiguous_mask(mask)
    grad_x, grad_A, grad_B = _backward(grad, x, weight, mask, adapters, h, need_x, need_lora)
    grad_weight = None
    if need_weight:
        assert x is not None and isinstance(weight, Tensor)
        grad_weight = _weight_gradient(grad, _rows(x), mask, weight.dtype)
    return grad_x, grad_weight, grad_A, grad_B


def _weight_gradient(grad: Tensor, x: Tensor, mask: BitMask, dtype: torch.dtype) -> Tensor:
    """``gradᵀ x`` where the mask keeps an entry, [out, in] in ``dtype``, the sum running over tokens."""
    if x.shape[0] == 0:
        return x.new_zeros(mask.shape, dtype=dtype)
    out = _new(x, *mask.shape, dtype=dtype)
    precision = product_precision(grad.dtype, chosen_isa())
    # turned once here: every task of the product would read it with strides of a row
    left = grad.t().resolve_neg().contiguous()
    _product(left, _dense_tuple(x), out, transposed=True, out_mask=mask, precision=precision)
    return out


# ---- silu_mul


@registry.register("silu_mul", "cpu", supports=supports_values)
def silu_mul(gate: Tensor, up: Tensor, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """Forward; see :func:`peftkern.ops.silu_mul.silu_mul_reference`. Tensors that are not contiguous are copied."""
    gate, up = gate.contiguous(), up.contiguous()
    out = _new(gate, *gate.shape) if out is None else out
    native.silu_mul(
        chosen_isa(),
        ACTIVATIONS.index(activation),
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        _DTYPE_CODE[gate.dtype],
        gate.numel(),
        torch.get_num_threads(),
    )
    return out


@registry.register("silu_mul_backward", "cpu", supports=supports_values)
def silu_mul_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    need_gate: bool,
    need_up: bool,
    activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None]:
    """Backward; see :func:`peftkern.ops.silu_mul.silu_mul_backward_reference`."""
    return _gate_backward(grad.contiguous(), gate, up, None, need_gate, need_up, activation, free)


def _gate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    out: Tensor | None,
    need_gate: bool,
    need_up: bool,
    activation: str,
    free: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gate and up; writes the product of the forward pass to ``out``, which may be ``grad``."""
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    grad_gate = _gradient_memory(gate, need_gate, free[0])
    grad_up = _gradient_memory(gate if up is None else up, need_up, free[1] and up is not None)
    native.silu_mul_backward(
        chosen_isa(),
        ACTIVATIONS.index(activation),
        grad.data_ptr(),
        gate.data_ptr(),
        _address(up),
        _address(out),
        _address(grad_gate),
        _address(grad_up),
        _DTYPE_CODE[gate.dtype],
        gate.numel(),
        torch.get_num_threads(),
    )
    return grad_gate, grad_up


def _gradient_memory(operand: Tensor, need: bool, free: bool) -> Tensor | None:
    if not need:
        return None
    return operand if free else _new(operand, *operand.shape)


# ---- gated_lora_linear


def _supports_gated_backward(grad: Tensor, _gate: Tensor, _up: Tensor, weight: Weight, *_rest: Any) -> str | None:
    return _objection(grad, weight)


@registry.register("gated_lora_linear_backward", "cpu", supports=_supports_gated_backward)
def gated_lora_linear_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_gate: bool,
    need_up: bool,
    need_lora: Sequence[bool],
    activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.gated_lora_linear.gated_lora_linear_backward_reference`.

    One pass over gate and up gives their gradients and, written over the gradient of the product, its input again.
    """
    need_A = any(need_lora[: len(adapters)])
    if grad.shape[0] == 0 or not (need_gate or need_up):
        x = silu_mul(gate, up, activation) if need_A and up is not None else None
        _none, grad_A, grad_B = lora_linear_backward(grad, x, weight, adapters, h, False, need_lora)
        empty = [torch.empty_like(gate) if need else None for need in (need_gate, need_up)]
        return empty[0], empty[1], grad_A, grad_B
    grad = _rows(grad)
    g = _inner_gradients(grad, adapters)
    grad_x = _input_gradient(grad, weight, None, adapters, g)
    x = grad_x if need_A else None
    grads = _gate_backward(grad_x, gate, up, x, need_gate, need_up, activation, free)
    return *grads, *_adapter_gradients(grad, x, adapters, g, h, need_lora)
