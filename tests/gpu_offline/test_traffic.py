"""The traffic counter: by hand on small modules, on the layer of the benchmarks, and on what it must not overlook."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import ops
from peftkern.backends import registry
from peftkern.backends.triton import devices, launch, lora_linear
from peftkern.bench.registry import BENCHMARKS
from peftkern.bench.traffic import cases, table
from peftkern.bench.traffic.counter import Kernel, Step, counting
from peftkern.bench.traffic.layer import (
    LINEARS,
    LLAMA_3_8B,
    REPLACED,
    TOKENS,
    Shape,
    bitsandbytes_linear,
    count_step,
    our_layer,
    peer_layer,
    quantized_linear,
    with_adapters,
)
from peftkern.bench.traffic.linears import Part, breakdown, is_in_block, of_linears, of_others, saved_bytes, total
from peftkern.formats import QuantizedTensor, codebook
from peftkern.ops.lora_linear import Adapters
from peftkern.patch import fused

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SMALL = Shape(hidden_size=256, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1)
MAKERS = {"ours": our_layer, "peer": peer_layer}


def empty(*shape: int, dtype: torch.dtype = BFLOAT16, gradient: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


def count(function: Callable[[], object], model: nn.Module | None = None) -> Step:
    with counting(model or nn.Module(), REPLACED) as step:
        function()
    return step


@pytest.fixture(scope="module", params=list(cases.ADAPTERS.values()), ids=["bf16-adapters", "float32-adapters"])
def steps(request: pytest.FixtureRequest) -> cases.Steps:
    return cases.count_both(request.param)


# ---- operators

M, K, N = 6, 10, 14
SQUARE = M * M * 2  # bytes of a bfloat16 matrix
OPERATORS: dict[str, tuple[Callable[[], object], int, int, int]] = {
    # what runs; launches, bytes read, bytes written
    "mm": (lambda: empty(M, K) @ empty(K, N), 1, 2 * (M * K + K * N), 2 * M * N),
    "linear-of-three-dimensions": (
        lambda: nn.functional.linear(empty(2, M, K), empty(N, K)),
        1,
        2 * (2 * M * K + N * K),
        4 * M * N,
    ),
    "addmm-into-its-operand": (
        lambda: (y := empty(M, N)) is torch.addmm(y, empty(M, K), empty(K, N), out=y),
        1,
        2 * (M * N + M * K + K * N),
        2 * M * N,
    ),
    "mm-into-memory": (lambda: torch.mm(empty(M, M), empty(M, M), out=empty(M, M)), 1, 2 * SQUARE, SQUARE),
    "views": (lambda: empty(M, M).t().reshape(M, 2, M // 2).transpose(0, 1)[:, 1:].detach(), 0, 0, 0),
    "memory-alone": (lambda: torch.empty_like(empty(M, M)).new_empty(3), 0, 0, 0),
    "contiguous-already": (lambda: empty(M, M).contiguous(), 0, 0, 0),
    "contiguous-copy": (lambda: empty(M, M).t().contiguous(), 1, SQUARE, SQUARE),
    "reshape-copy": (lambda: empty(M, M).t().reshape(-1), 1, SQUARE, SQUARE),
    "cast-to-the-same": (lambda: empty(M, M).to(BFLOAT16), 0, 0, 0),
    "cast": (lambda: empty(M, M).to(FLOAT32), 1, SQUARE, 2 * SQUARE),
    "zeros": (lambda: torch.zeros(M, M, dtype=BFLOAT16, device="meta"), 1, 0, SQUARE),
    "zeros-like": (lambda: torch.zeros_like(empty(M, M)), 1, 0, SQUARE),
    "zero-in-place": (lambda: empty(M, M).zero_(), 1, 0, SQUARE),
    "copy-into": (lambda: empty(M, M).copy_(empty(M, M)), 1, SQUARE, SQUARE),
    "add-in-place": (lambda: empty(M, M).add_(empty(M, M)), 1, 2 * SQUARE, SQUARE),
    "the-same-operand-twice": (lambda: (x := empty(M, M)) * x, 1, SQUARE, SQUARE),
    "an-expanded-operand": (lambda: empty(M, M) + empty(1, M).expand(M, M), 1, SQUARE + 2 * M, SQUARE),
    "cat": (lambda: torch.cat([empty(M, M), empty(M, M)]), 1, 2 * SQUARE, 2 * SQUARE),
    "sum": (lambda: empty(M, M).sum(0), 1, SQUARE, 2 * M),
    "on-the-cpu": (lambda: torch.ones(M) + torch.ones(M), 0, 0, 0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_counts_as_its_kernel_would(name: str) -> None:
    function, launches, read, written = OPERATORS[name]
    kernels = count(function).kernels
    assert len(kernels) == launches
    assert (sum(k.bytes_read for k in kernels), sum(k.bytes_written for k in kernels)) == (read, written)


def test_products_have_their_operations_counted() -> None:
    (kernel,) = count(lambda: empty(M, K) @ empty(K, N)).kernels
    assert kernel == Kernel("aten::mm", "(outside)", False, (M, N), 2 * (M * K + K * N), 2 * M * N, 2 * M * N * K)


# ---- modules


class Fork(nn.Module):
    """Two products of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(K, K, bias=False, dtype=BFLOAT16, device="meta")
        self.right = nn.Linear(K, K, bias=False, dtype=BFLOAT16, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        return self.left(x) * self.right(x)


def test_launches_belong_to_the_module_that_made_them_in_both_passes() -> None:
    fork = Fork()
    step = count(lambda: fork(empty(M, K, gradient=True)).backward(empty(M, K)), fork)
    launches = [(kernel.name, kernel.module, kernel.backward) for kernel in step.kernels]
    assert launches == [
        ("aten::sin", "", False),
        ("aten::mm", "left", False),
        ("aten::mm", "right", False),
        ("aten::mul", "", False),
        ("aten::mul", "", True),
        ("aten::mul", "", True),
        ("aten::mm", "right", True),
        ("aten::mm", "right", True),
        ("aten::mm", "left", True),
        ("aten::mm", "left", True),
        ("aten::add", "left", True),  # both gradients of what they share meet behind the second one
        ("aten::cos", "", True),
        ("aten::mul", "", True),
    ]


def test_what_is_kept_belongs_to_the_module_that_keeps_it() -> None:
    fork = Fork()
    kept = count(lambda: fork(empty(M, K, gradient=True)), fork).saved
    modules: dict[int, set[str]] = {}
    for saved in kept:
        assert saved.bytes == 2 * M * K
        modules.setdefault(saved.storage, set()).add(saved.module)
    # the input of sin; what both products share; the two factors. No weight.
    assert sorted(map(sorted, modules.values())) == [[""], [""], [""], ["left", "right"]]


# ---- one linear layer with an adapter, by hand

TOKENS_, IN, OUT, RANK = 2048, 4096, 1024, 16
X, Y, W, A, B = 2 * TOKENS_ * IN, 2 * TOKENS_ * OUT, 2 * OUT * IN, 2 * RANK * IN, 2 * RANK * OUT
H = 2 * TOKENS_ * RANK
H32 = 2 * H
CODES, SCALES = OUT * IN // 2, OUT * IN // 64
SCALES32, ABSMAX = 4 * SCALES, 4 * (SCALES // 256)


class OneLinear(nn.Module):
    """Under a name that the benchmarks look for."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(IN, OUT, bias=False, dtype=BFLOAT16, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q_proj(x)
        return out


def count_linear(quantized: Callable[[nn.Linear], nn.Module], patch: bool) -> Step:
    model = with_adapters(OneLinear(), quantized, BFLOAT16)
    if patch:
        peftkern.patch(model, strict=True)
    with devices.assumed(devices.H100):
        for _first_step in (True, False):
            step = count(lambda: model(empty(1, TOKENS_, IN, gradient=True)).backward(empty(1, TOKENS_, OUT)), model)
            model.zero_grad()
    return step


def test_the_peer_s_linear_by_hand() -> None:
    step = count_linear(bitsandbytes_linear, patch=False)
    decode = [
        ("bitsandbytes::dequantize_blockwise", SCALES + ABSMAX + 4 * 256, SCALES32),
        ("aten::add", SCALES32 + 4, SCALES32),
        ("bitsandbytes::dequantize_4bit", CODES + SCALES32, W),
    ]
    forward = [
        *decode,
        ("aten::mm", X + W, Y),
        ("aten::clone", Y, Y),
        ("aten::mm", X + A, H),
        ("aten::mm", H + B, Y),
        ("aten::mul", Y, Y),
        ("aten::add", 2 * Y, Y),
    ]
    backward = [
        ("aten::mul", Y, Y),
        ("aten::mm", Y + H, B),
        ("aten::mm", Y + B, H),
        ("aten::mm", H + X, A),
        ("aten::mm", H + A, X),
        decode[0],
        ("aten::add_", SCALES32 + 4, SCALES32),
        decode[2],
        ("aten::mm", Y + W, X),
        ("aten::add", 2 * X, X),
    ]
    launches = [(kernel.name, kernel.bytes_read, kernel.bytes_written) for kernel in step.kernels]
    assert launches == forward + backward
    assert [kernel.backward for kernel in step.kernels] == [False] * len(forward) + [True] * len(backward)
    assert len(of_linears(step)) == len(step.kernels)
    assert saved_bytes(step) == X + H
    assert breakdown(step.kernels)[Part.DEQUANTIZE].launches == 6
    assert total(step.kernels).flops == 4 * TOKENS_ * OUT * IN + 6 * TOKENS_ * RANK * (IN + OUT)


def test_our_linear_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear._Call, "path", lambda self, direction: lora_linear.Path.STAGED)
    step = count_linear(quantized_linear, patch=True)
    codes = CODES + SCALES + ABSMAX + 4
    forward = [
        ("project_kernel", X + A, H32),
        ("dequantize_blocks_kernel", codes, W),
        ("product_kernel", X + W + H32 + B, Y),
    ]
    launches = [(kernel.name, kernel.bytes_read, kernel.bytes_written) for kernel in step.kernels]
    assert launches[:3] == forward
    pull, sums, *rest = launches[3:]
    # g and dB come in parts, whose number the tiles decide; what they take is read once to add them up
    assert (pull[0], pull[1]) == ("pull_kernel", Y + B + H32)
    assert sums == ("sum_parts_kernel", pull[2], H32 + B)
    assert H32 + B < pull[2] < X
    assert rest == [
        ("dequantize_blocks_kernel", codes, W),
        ("input_gradient_kernel", Y + W + H32 + A, X),
        ("push_kernel", X + H32, A),
    ]
    assert [kernel.backward for kernel in step.kernels] == [False] * 3 + [True] * 5
    assert saved_bytes(step) == X + H32


# ---- the layer of the benchmarks


def test_the_peer_s_figures() -> None:
    peer = count_step(peer_layer(LLAMA_3_8B, BFLOAT16), LLAMA_3_8B)
    sums = {part: (one.launches, round(one.bytes / 1e6)) for part, one in breakdown(of_linears(peer)).items()}
    assert sums == {Part.BASE: (14, 1544), Part.DEQUANTIZE: (42, 1207), Part.ADAPTER: (42, 1017), Part.REST: (38, 2215)}


def test_launches_of_the_linear_layers(steps: cases.Steps) -> None:
    assert total(of_linears(steps.ours)).launches <= total(of_linears(steps.peer)).launches / 4


def test_bytes_of_the_linear_layers(steps: cases.Steps) -> None:
    assert total(of_linears(steps.ours)).bytes <= 0.55 * total(of_linears(steps.peer)).bytes


def test_what_the_linear_layers_keep(steps: cases.Steps) -> None:
    assert saved_bytes(steps.ours) <= 0.5 * saved_bytes(steps.peer)


def test_what_the_layer_keeps_when_it_recomputes() -> None:
    figures = {one.case: (one.ours[0], one.peer[0]) for one in cases.saved_by_layer()}
    linears = {case: both for case, both in figures.items() if case.startswith("linear layers and SwiGLU")}
    limits = {"nothing recomputed": 81, "recompute='up'": 56, "recompute='mlp'": 28}
    for what, limit in limits.items():
        ours, peer = linears[f"linear layers and SwiGLU, {what}"]
        assert ours <= limit
        assert round(peer) == 136
    assert figures["whole layer, recompute='mlp'"][0] <= 0.4 * figures["whole layer, recompute='mlp'"][1]


FUSED = {"norm_kernel": 2, "norm_backward_kernel": 2, "rotary_kernel": 2}
"""Kernels of ours outside of the linear layers and the gate, and how often a layer launches them in a step."""


def test_nothing_is_moved_out_of_the_linear_layers(steps: cases.Steps) -> None:
    """Ours launches norms, rotary embeddings and its gate, and besides nothing that the peer does not launch."""
    ours, peer = (
        Counter(
            (kernel.module, kernel.name, kernel.bytes) for kernel in of_others(step) if not is_in_block(kernel.module)
        )
        for step in (steps.ours, steps.peer)
    )
    names = [name for _module, name, _bytes in ours.elements()]
    assert {name: names.count(name) for name in FUSED} == FUSED
    assert Counter({key: count for key, count in ours.items() if key[1] not in FUSED}) <= peer
    assert ours.total() <= 0.3 * peer.total()
    assert sum(size for _, _, size in ours.elements()) <= 0.5 * sum(size for _, _, size in peer.elements())
    gate = [kernel for kernel in of_others(steps.ours) if is_in_block(kernel.module)]
    activation = 2 * TOKENS * LLAMA_3_8B.intermediate_size
    assert [(kernel.name, kernel.bytes) for kernel in gate] == [
        ("silu_mul_kernel", 3 * activation),
        ("silu_mul_backward_kernel", 5 * activation),
    ]
    theirs = total(kernel for kernel in of_others(steps.peer) if is_in_block(kernel.module))
    assert (theirs.launches, theirs.bytes) == (5, 14 * activation)


def test_nothing_is_kept_elsewhere_instead(steps: cases.Steps) -> None:
    ours, peer = (kept_elsewhere(step) for step in (steps.ours, steps.peer))
    assert len(ours) > 6
    assert sum(size for _module, size in ours) < sum(size for _module, size in peer)


def kept_elsewhere(step: Step) -> list[tuple[str, int]]:
    kept = {(saved.module, saved.storage): saved.bytes for saved in step.saved if is_elsewhere(saved.module)}
    return sorted((module, size) for (module, _storage), size in kept.items())


def is_elsewhere(module: str) -> bool:
    """Whether this is neither one of the linear layers nor the block whose gate is ours."""
    return not (is_in_block(module) or set(LINEARS) & set(module.split(".")))


def test_a_step_counts_the_same_every_time() -> None:
    layer = our_layer(SMALL, BFLOAT16)
    assert count_step(layer, SMALL).kernels == count_step(layer, SMALL).kernels


def test_fewer_tokens_than_bitsandbytes_dequantizes_for_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1537, got 1536"):
        count_step(peer_layer(SMALL, BFLOAT16), SMALL, 1536)


def test_the_tables_hold_every_launch() -> None:
    steps = cases.count_both(BFLOAT16, SMALL)
    ours = of_linears(steps.ours)
    assert sum(part.launches for part in breakdown(ours).values()) == len(ours)
    assert len(table.kernels(ours).splitlines()) == len(ours) + 2
    assert f"| all linear layers | {len(ours)} |" in table.parts(steps)


@pytest.mark.parametrize("name", ["traffic-launches", "traffic-bytes", "traffic-saved"])
def test_the_benchmarks_say_what_was_counted(name: str) -> None:
    function = BENCHMARKS[name].cases.partition(":")[2]
    first, second = getattr(cases, function)()
    assert "sm_90" in first.case and f"{TOKENS} tokens" in first.case and first.case != second.case
    assert {"triton", "peft", "bitsandbytes"} <= set(BENCHMARKS[name].packages)


# ---- what must not be overlooked


def test_a_launch_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = our_layer(SMALL, BFLOAT16)
    before = of_linears(count_step(layer, SMALL))
    project = lora_linear.project

    def with_a_copy(x: Tensor, *rest: Any) -> None:
        project(x.clone(), *rest)

    monkeypatch.setattr(lora_linear, "project", with_a_copy)
    after = of_linears(count_step(layer, SMALL))
    copies = [kernel for kernel in after if kernel.name == "aten::clone"]
    products = sum(kernel.name == "project_kernel" for kernel in before)
    assert len(copies) == len(after) - len(before) == products > 0
    assert total(after).bytes == total(before).bytes + sum(kernel.bytes for kernel in copies)


def test_a_kernel_launched_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = our_layer(SMALL, BFLOAT16)
    before = total(of_linears(count_step(layer, SMALL)))
    project = lora_linear.project

    def twice(*arguments: Any) -> None:
        project(*arguments)
        project(*arguments)

    monkeypatch.setattr(lora_linear, "project", twice)
    assert total(of_linears(count_step(layer, SMALL))).launches > before.launches


def test_a_tensor_kept_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = our_layer(SMALL, BFLOAT16)
    before = saved_bytes(count_step(layer, SMALL))

    def keeping_the_product(gate: Tensor, up: Tensor, *rest: Any, values: Any, backend: Any, **_deltas: Any) -> Tensor:
        assert values == []  # no sparse deltas
        return ops.lora_linear(ops.silu_mul(gate, up), *rest, backend=backend)

    monkeypatch.setattr(fused, "gated_lora_linear", keeping_the_product)
    assert saved_bytes(count_step(layer, SMALL)) == before + 2 * TOKENS * SMALL.intermediate_size


def test_a_triton_launch_belongs_to_the_module_that_made_it() -> None:
    class Launching(nn.Module):
        def forward(self, x: Tensor) -> None:
            launch.launch(stray_kernel, (1,), x, traffic=lambda: launch.Traffic((x,), ()), num_warps=1, num_stages=1)

    model = nn.Sequential(nn.Identity(), Launching())
    assert count(lambda: model(empty(M)), model).kernels == [Kernel("stray_kernel", "1", False, (), 2 * M, 0, 0)]


def stray_kernel() -> None:
    """Stands for a kernel; tensors without memory launch none."""


def test_an_operator_of_ours_is_seen_as_the_kernels_behind_it() -> None:
    q = ops.quantize(empty(64, 64), double_quant=True)
    step = count(lambda: torch.ops.peftkern.dequantize(*dequantize_arguments(q)))
    assert [kernel.name for kernel in step.kernels] == ["dequantize_blocks_kernel"]


def dequantize_arguments(q: QuantizedTensor) -> tuple[Any, ...]:
    nested = q.double_quantization
    assert nested is not None
    return (
        q.packed,
        q.scales,
        nested.absmax,
        nested.offset,
        q.format,
        q.block_size,
        nested.block_size,
        q.shape,
        BFLOAT16,
        None,
    )


SIDES = [pytest.param(side, dtype, id=f"{side}-{dtype}") for side in MAKERS for dtype in (BFLOAT16, FLOAT32)]


@pytest.mark.parametrize(("side", "dtype"), SIDES)
def test_all_that_is_alive_after_the_forward_pass_was_seen_being_kept(side: str, dtype: torch.dtype) -> None:
    layer = MAKERS[side](SMALL, dtype)
    count_step(layer, SMALL)
    x = empty(1, TOKENS, SMALL.hidden_size, gradient=True)
    angles = empty(1, TOKENS, SMALL.hidden_size // SMALL.num_attention_heads)
    with counting(layer, REPLACED) as step, Alive() as alive:
        y = layer(x, position_embeddings=(angles, angles))
    gc.collect()
    seen = {saved.storage for saved in step.saved} | {y.untyped_storage()._cdata}
    assert set(alive.storages) - seen == set()
    assert len(set(alive.storages) & seen) > 10


class Alive(TorchDispatchMode):
    """Follows the memory that operators make until it is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        return out


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


# ---- what our launches declare


@contextmanager
def recorded_calls() -> Iterator[list[launch.Launch]]:
    with devices.assumed(devices.H100), launch.recording() as launches:
        yield launches


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=["bf16-adapters", "float32-adapters"])
@pytest.mark.parametrize(("tokens", "shape"), [(2048, (4096, 4096)), (2048, (1024, 4096)), (8, (1024, 4096))])
def test_every_tensor_that_a_kernel_gets_is_declared(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A launch names what it reads and writes by hand: all memory that it is handed must be among that."""
    q = ops.quantize(empty(*shape), double_quant=True)
    adapters = Adapters([empty(RANK, shape[1], dtype=dtype)], [empty(shape[0], RANK, dtype=dtype)], [2.0], [0.0], None)
    x, grad = empty(tokens, shape[1]), empty(tokens, shape[0])
    with recorded_calls() as launches:
        _, h = registry.run("lora_linear", x, q, adapters, None)
        registry.run("lora_linear_backward", grad, x, q, adapters, h, True, [True, True])
    check_declared(launches, {memory_of(x), memory_of(grad)})


def test_every_tensor_that_the_layer_s_kernels_get_is_declared() -> None:
    """The same for the groups that share an input and for the gate that its layer makes again."""
    layer = our_layer(LLAMA_3_8B, BFLOAT16)
    with recorded_calls() as launches:
        count_step(layer, LLAMA_3_8B)
    assert {"project_kernel", "push_kernel", "silu_mul_backward_kernel"} <= {recorded.kernel for recorded in launches}
    check_declared(launches, set())


def check_declared(launches: Sequence[launch.Launch], unread_without_base: set[tuple[Any, ...]]) -> None:
    """Products without a base weight are handed the activations as well, and do not look at them."""
    assert launches
    for recorded in launches:
        assert recorded.call is not None
        unread = unread_without_base if recorded.call.constants.get("BASE") is False else set()
        handed = {memory_of(tensor): tensor.nbytes for tensor in tensors_in(recorded.call.arguments)}
        sizes = [size for memory, size in handed.items() if memory not in unread and memory[2] not in CODEBOOKS]
        assert recorded.bytes_read + recorded.bytes_written >= sum(sizes) > 0, recorded.kernel


CODEBOOKS = {codebook(format).shape for format in ("nf4", "int8_blockwise")}
"""Tables of values, of which a cache holds one copy."""


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def test_the_whole_layer_launches_a_quarter_and_moves_half(steps: cases.Steps) -> None:
    ours, peer = total(steps.ours.kernels), total(steps.peer.kernels)
    assert peer.launches > 200  # with norms, rotary embedding and attention
    assert ours.launches <= peer.launches / 4
    assert ours.bytes <= peer.bytes / 2
