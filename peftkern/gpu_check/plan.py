"""What is timed, the most important first: whoever runs out of time has lost the least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from peftkern.backends.cuda import MAX_TOKENS
from peftkern.backends.triton.devices import Rates
from peftkern.backends.triton.launch import Launch
from peftkern.backends.triton.roofline import OVERHEAD, possible_paths
from peftkern.gpu_check.items import Conversion, Gate, GatedBackward, Item, Kernels, Norm, Operation, Rotation
from peftkern.gpu_check.training_items import (
    Importance,
    MaskedProduct,
    Selection,
    SparseProduct,
    TrainingItem,
    Update,
)
from peftkern.tune.measure import DIRECTIONS, product
from peftkern.tune.operands import Subject
from peftkern.tune.shapes import LLAMA_3_8B

TOKENS = (2048, 1, 512, 8, 8192, 64)
"""Numbers of tokens, the most telling first."""

_DOWN = LLAMA_3_8B[3]
_SQUARE = (4096, 4096)
_WEIGHTS = (_SQUARE, (14336, 4096))
_CONVERSIONS = (("nf4", False), ("nf4", True), ("fp4", False), ("int8", False), ("int8_blockwise", False))
"""Format, and whether its scales are quantized as well."""
_OTHERS = (("int8", torch.bfloat16), (None, torch.bfloat16), ("nf4", torch.float16), ("nf4", torch.float32))
_CALLS_PER_TIME = 150
"""Calls that one time takes, warm-up included."""
_SETUP_SECONDS = 0.3
"""Making operands and comparing results."""
_PEER_SECONDS = 0.5
"""Building one of the others' layers, for each set of operands."""


def items() -> list[Item]:
    """Everything, in order."""
    operations = [
        Operation(Subject(group, "nf4", torch.bfloat16), tokens, direction)
        for tokens in TOKENS
        for group in LLAMA_3_8B
        for direction in DIRECTIONS
    ]
    return [
        *operations,
        *map(Kernels, operations),
        *_conversions(),
        *_native(),
        *_gates(),
        *_training(),
        *_other_weights(),
        *_forced_paths(operations),
    ]


def _conversions() -> Iterator[Item]:
    for shape in _WEIGHTS:
        for operation in ("dequantize", "quantize"):
            for format, double_quant in _CONVERSIONS:
                for backend in ("cuda", "triton"):
                    yield Conversion(operation, format, shape, torch.bfloat16, backend, double_quant)


def _native() -> Iterator[Item]:
    for tokens in (1, 8, MAX_TOKENS):
        for group in LLAMA_3_8B:
            if len(group.outputs) == 1:
                yield Operation(Subject(group, "nf4", torch.bfloat16), tokens, "forward", native=True)


def _gates() -> Iterator[Item]:
    for tokens in TOKENS:
        for direction in DIRECTIONS:
            yield Gate(tokens, 14336, torch.bfloat16, direction)
            yield Norm(tokens, 4096, torch.bfloat16, direction)
        yield Rotation(tokens, 4096, torch.bfloat16, "forward")
        yield GatedBackward(Subject(_DOWN, "nf4", torch.bfloat16), tokens)


def _training() -> Iterator[Item]:
    for tokens in (2048, 8):
        for direction in DIRECTIONS:
            for density in (0.001, 0.01):
                yield SparseProduct(_SQUARE, density, tokens, torch.bfloat16, direction)
            yield MaskedProduct(_SQUARE, 0.5, tokens, torch.bfloat16, direction)
    yield Update(_SQUARE, 32, torch.float32)
    for bits in (32, 8):
        for kept in (None, 0.01):
            yield Update(_SQUARE, bits, torch.bfloat16, kept)
        yield Update(_SQUARE, bits, torch.bfloat16, probe=True)
    yield Selection(_SQUARE, 0.01, torch.bfloat16)
    yield Selection(_SQUARE, 0.01, torch.float32, excluded=0.1)
    for over in ("entries", "rows", "all", "probe"):
        yield Importance(_SQUARE, over, torch.bfloat16)


def _other_weights() -> Iterator[Item]:
    for format, dtype in _OTHERS:
        for tokens in (2048, 8):
            for direction in DIRECTIONS:
                yield Operation(Subject(LLAMA_3_8B[0], format, dtype), tokens, direction)


def _forced_paths(operations: Sequence[Operation]) -> Iterator[Item]:
    for operation in operations:
        for path in possible_paths(product(operation.subject, operation.direction, operation.tokens)):
            yield Operation(operation.subject, operation.tokens, operation.direction, path)


def expected_seconds(item: Item, launches: Sequence[Launch], rates: Rates, peers: Sequence[str]) -> float:
    """About how long timing an item with these launches takes beside ``peers``; the kernels are compiled by then."""
    one = sum(
        max((launched.bytes_read + launched.bytes_written) / rates.bandwidth, launched.flops / rates.half) + OVERHEAD
        for launched in launches
    )
    timed = item.peers if isinstance(item, Operation | TrainingItem) else ()
    others = sum(name in timed for name in peers)
    return _SETUP_SECONDS + others * _PEER_SECONDS + (1 + others) * _CALLS_PER_TIME * 2 * one
