"""The product with a sparse delta S, and its gradients; formulas and shapes in :mod:`peftkern.ops.sparse_delta_linear`.

    forward    y[t, r]  += s · Σ values[i] · x[t, columns[i]]            over the entries i of row r
    backward   dX[t, c] += s · Σ values[order[k]] · dY[t, rows[k]]       over the entries k of column c
               dS[order[k]] = s · Σ dY[t, rows[k]] · x[t, c]             over the tokens t

One kernel does all three: it walks over rows of S forward and over columns backward. A program takes a few rows (or
columns) and some tokens, and goes through the entries of all its rows together, so many at a time: a long row among
short ones costs what its entries cost. What it gathers for them, [entries, tokens], is multiplied from the left with a
matrix that holds each value in the row of its owner and zero elsewhere; backward the same gathered dY meets the
program's own columns of x, and of these products each entry keeps the one that is its own. So dY is read once for both
gradients. dS is written in parts, one for each block of tokens, and summed by :mod:`.reduce`: no atomics.

Sums are in float32. Values are cut into two bfloat16 numbers where 16-bit activations allow tensor cores. An infinity
or NaN reaches all rows of its program, whose y (or dX) of that token the base product has spoiled before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.configurations import Tile, tile_for
from peftkern.backends.triton.crossover import device_key
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.reduce import parts_of, sum_parts
from peftkern.backends.triton.scratch import scratch
from peftkern.backends.triton.sparse_layout import is_copied
from peftkern.formats import SparseIndices

_MOST_COPIED_TOKENS = 4096
"""More are copied and multiplied one slice after the other, so that the copy stays small and in the cache."""
_COPIED_FEATURES = 64
"""Of a program that copies."""


# ---- kernels


@triton.jit
def transpose_kernel(
    source,
    copy,
    tokens,
    features,
    token_stride,
    feature_stride,
    copy_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    token_numbers = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    feature_numbers = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    rows, columns = token_numbers.to(tl.int64), feature_numbers.to(tl.int64)
    exists = (token_numbers < tokens)[:, None] & (feature_numbers < features)[None, :]
    pointers = source + rows[:, None] * token_stride + columns[None, :] * feature_stride
    tile = tl.trans(tl.load(pointers, mask=exists, other=0.0))
    # the tokens up to a whole block are zeros
    tl.store(copy + columns[:, None] * copy_stride + rows[None, :], tile, mask=(feature_numbers < features)[:, None])


@triton.jit
def add_spread(total, values, belongs, gathered, PRECISION: tl.constexpr):
    """``total`` + the values, each in the row that it belongs to, times what was gathered for them."""
    if gathered.dtype == tl.float32:
        return tl.dot(tl.where(belongs, values[None, :], 0.0), gathered, total, input_precision=PRECISION)
    else:  # noqa: RET505 - Triton compiles what follows a return
        # float16 reaches not as low as values do: it is multiplied as TF32, which holds both kinds exactly
        OPERAND: tl.constexpr = tl.bfloat16 if gathered.dtype == tl.bfloat16 else tl.float32
        right = gathered.to(OPERAND)
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
        zero = tl.zeros_like(high)
        left = tl.where(belongs, high[None, :], zero[None, :]).to(OPERAND)
        total = tl.dot(left, right, total, input_precision="tf32")
        left = tl.where(belongs, low[None, :], zero[None, :]).to(OPERAND)
        return tl.dot(left, right, total, input_precision="tf32")


@triton.jit
def own_products(pair, gathered, belongs, PRECISION: tl.constexpr):
    """For each entry the sum over tokens of what was gathered times its own column of ``pair``, [tokens, columns]."""
    if pair.dtype != gathered.dtype:
        pair, gathered = pair.to(tl.float32), gathered.to(tl.float32)
    products = tl.dot(tl.trans(pair), tl.trans(gathered), input_precision=PRECISION)
    return tl.sum(tl.where(belongs, products, 0.0), axis=0)


@triton.jit
def sparse_product_kernel(
    source,
    values,
    offsets,
    others,
    order,
    target,
    pair,
    gradients,
    tokens,
    features,
    entries,
    token_stride,
    feature_stride,
    target_strides,
    pair_strides,
    scaling,
    COPIED: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_tile = tl.program_id(1)
    token_numbers = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first_feature = tl.program_id(0) * BLOCK_FEATURES
    feature_numbers = first_feature + tl.arange(0, BLOCK_FEATURES)
    rows, columns = token_numbers.to(tl.int64), feature_numbers.to(tl.int64)
    exists = (token_numbers < tokens)[:, None] & (feature_numbers < features)[None, :]

    # entries are counted from the program's first, in 32 bits
    first_entry = tl.load(offsets + first_feature)
    count = (tl.load(offsets + tl.minimum(first_feature + BLOCK_FEATURES, features)) - first_entry).to(tl.int32)
    begins = (tl.load(offsets + tl.minimum(feature_numbers, features)) - first_entry).to(tl.int32)
    ends = (tl.load(offsets + tl.minimum(feature_numbers + 1, features)) - first_entry).to(tl.int32)

    if COPIED:
        source_rows = source + rows
    else:
        source_rows = source + tl.minimum(token_numbers, tokens - 1).to(tl.int64) * token_stride
    total = tl.zeros((BLOCK_FEATURES, BLOCK_TOKENS), tl.float32)
    if NEED_VALUES:
        pair_pointers = pair + rows[:, None] * pair_strides[0] + columns[None, :] * pair_strides[1]
        pair_tile = tl.load(pair_pointers, mask=exists, other=0.0)
        part = gradients + token_tile.to(tl.int64) * entries

    for first in range(0, count, BLOCK_ENTRIES):
        numbers = first + tl.arange(0, BLOCK_ENTRIES)
        inside = numbers < count
        other = tl.load(others + first_entry + numbers, mask=inside, other=0).to(tl.int64)
        gathered = tl.load(source_rows[None, :] + other[:, None] * feature_stride, mask=inside[:, None], other=0.0)
        places = first_entry + numbers
        if BACKWARD:
            places = tl.load(order + places, mask=inside, other=0)
        belongs = (numbers[None, :] >= begins[:, None]) & (numbers[None, :] < ends[:, None])
        if HAS_TARGET:
            value = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
            total = add_spread(total, value, belongs, gathered, PRECISION)
        if NEED_VALUES:
            products = own_products(pair_tile, gathered, belongs, PRECISION)
            tl.store(part + places, (products * scaling).to(part.dtype.element_ty), mask=inside)

    if HAS_TARGET:
        pointers = target + rows[:, None] * target_strides[0] + columns[None, :] * target_strides[1]
        before = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
        tl.store(pointers, (before + scaling * tl.trans(total)).to(target.dtype.element_ty), mask=exists)


# ---- launches


def sparse_delta(y: Tensor, x: Tensor, values: Tensor, indices: SparseIndices, scaling: float) -> None:
    """``y += scaling * x Sᵀ`` in place; see :func:`peftkern.ops.sparse_delta_linear.sparse_delta_reference`."""
    if x.shape[0] == 0 or len(indices) == 0:
        return
    walk = _Walk(indices.row_offsets, indices.columns, None, values.contiguous(), scaling)
    _product(x, walk, y, None, None)


def sparse_delta_backward(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    values: Tensor,
    indices: SparseIndices,
    scaling: float,
    need_values: bool,
) -> Tensor | None:
    """Adds to ``grad_x`` in place, if it is there, and returns the gradient of the values, if that is needed.

    See :func:`peftkern.ops.sparse_delta_linear.sparse_delta_backward_reference`.
    """
    gradients = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else None
    if len(indices) == 0 or (grad_x is None and gradients is None):
        return gradients
    if grad.shape[0] == 0:
        return None if gradients is None else gradients.zero_()
    walk = _Walk(indices.column_offsets, indices.rows, indices.order, values.contiguous(), scaling)
    _product(grad, walk, grad_x, x, gradients)
    return gradients


@dataclass(frozen=True)
class _Walk:
    """S in the order in which it is gone through.

    Attributes:
        offsets: [features + 1] of the rows, or of the columns.
        others: [entries], the column, or the row, of each.
        order: [entries], where its value is; ``None``: in the same place.
        values: [entries].
        scaling: of S.
    """

    offsets: Tensor
    others: Tensor
    order: Tensor | None
    values: Tensor
    scaling: float


def _product(source: Tensor, walk: _Walk, target: Tensor | None, pair: Tensor | None, gradients: Tensor | None) -> None:
    """Add to ``target``, and write ``gradients``, where they are there.

    Args:
        source: [tokens, others' features], gathered from.
        walk: S.
        target: [tokens, features].
        pair: [tokens, features], with ``gradients``.
        gradients: [entries].
    """
    source = source.detach().resolve_neg()
    pair = None if pair is None or gradients is None else pair.detach().resolve_neg()
    tokens, entries = source.shape[0], walk.others.shape[0]
    copied = is_copied(entries, tokens, source.shape[1], source.dtype)
    major, minor = device_key(source).capability
    tile = tile_for("sparse", 10 * major + minor, source.dtype, tokens, tight=not copied)
    step = _MOST_COPIED_TOKENS if copied else tokens
    parts = None if gradients is None else parts_of(gradients, cdiv(tokens, tile.tokens))
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        rows = slice(begin, end)
        some = None if parts is None else parts.view(-1, entries)[begin // tile.tokens : cdiv(end, tile.tokens)]
        _slice(
            source[rows],
            walk,
            None if target is None else target[rows],
            None if pair is None else pair[rows],
            some,
            tile,
            copied,
        )
    if parts is not None and gradients is not None and parts is not gradients:
        sum_parts([parts], [gradients])


def _slice(
    source: Tensor,
    walk: _Walk,
    target: Tensor | None,
    pair: Tensor | None,
    parts: Tensor | None,
    tile: Tile,
    copied: bool,
) -> None:
    """One launch for some tokens, and one in front that copies; ``parts`` is [blocks of tokens, entries]."""
    tokens, entries, features = source.shape[0], walk.others.shape[0], walk.offsets.shape[0] - 1
    strides = source.stride()
    if copied:
        source = _copy(source, tile)
        strides = (1, source.stride(0))
    single = torch.float32 in (source.dtype, source.dtype if pair is None else pair.dtype)
    launch(
        sparse_product_kernel,
        (cdiv(features, tile.columns), cdiv(tokens, tile.tokens)),
        source,
        walk.values,
        walk.offsets,
        walk.others,
        walk.others if walk.order is None else walk.order,
        source if target is None else target,
        source if pair is None else pair,
        walk.values if parts is None else parts,
        tokens,
        features,
        entries,
        *strides,
        (0, 0) if target is None else target.stride(),
        (0, 0) if pair is None else pair.stride(),
        float(walk.scaling),
        traffic=lambda: Traffic(
            (source, walk.offsets, walk.others, walk.order, pair, target, None if target is None else walk.values),
            (target, parts),
            flops=2 * tokens * entries * ((target is not None) + (parts is not None)),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        COPIED=copied,
        BACKWARD=walk.order is not None,
        HAS_TARGET=target is not None,
        NEED_VALUES=parts is not None,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_FEATURES=tile.columns,
        BLOCK_ENTRIES=tile.inner,
        PRECISION="tf32" if single and torch.get_float32_matmul_precision() != "highest" else "ieee",
    )


def _copy(source: Tensor, tile: Tile) -> Tensor:
    """``source``, [tokens, features], as [features, tokens up to a whole block] in the scratch buffer."""
    tokens, features = source.shape
    blocks = cdiv(tokens, tile.tokens)
    copy = scratch(source, features * blocks * tile.tokens).view(features, blocks * tile.tokens)
    launch(
        transpose_kernel,
        (cdiv(features, _COPIED_FEATURES), blocks),
        source,
        copy,
        tokens,
        features,
        *source.stride(),
        copy.stride(0),
        traffic=lambda: Traffic((source,), (copy,)),
        num_warps=8,
        num_stages=1,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_FEATURES=_COPIED_FEATURES,
    )
    return copy
