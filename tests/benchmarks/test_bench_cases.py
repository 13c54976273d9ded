"""The real cases at small sizes: they set up, agree with the peer, and notice when they do not. No timings."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern.bench import (
    Case,
    DisagreementError,
    Effort,
    Quantity,
    attention,
    half_step,
    layer_plans,
    linear,
    llama8b,
    loss,
    measure,
    memory,
    optimizer,
    packing,
    peers,
    select_prediction,
    select_top,
    smollm2,
    sparse_linear,
    sparse_step,
    step,
)
from peftkern.bench import quantize as quantize_cases
from peftkern.finetune.encoding import PadRight

ONCE = Effort(minimum_pairs=1, maximum_pairs=1, seconds=0.0)
PRECISIONS = [linear.HIGHEST, linear.HIGH, linear.BF16, linear.BF16_DEFAULT]
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> smollm2.Checkpoint:
    folder = str(tmp_path_factory.mktemp("model"))
    smollm2.save_random(folder, **SMALL)
    return smollm2.Checkpoint(folder, "small")


@pytest.mark.parametrize("precision", PRECISIONS, ids=["highest", "high", "bf16", "bf16-float32-adapter"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_linear_agrees_with_the_peer(precision: linear.Precision, tokens: int) -> None:
    layers = linear.setup_layers(precision, features_out=192, features_in=320)
    case = linear.setup_case(layers, tokens)
    case.check()
    assert case.case.startswith(f"{tokens} token")
    assert torch.get_float32_matmul_precision() == "highest"
    packed = linear._layer(layers.ours).base_layer.weight
    assert packed.numel() * 2 == 192 * 320


def test_linear_runs_our_side_patched_and_the_peer_on_bitsandbytes() -> None:
    layers = linear.setup_layers(linear.HIGHEST, features_out=64, features_in=64)
    assert type(linear._layer(layers.peer)).__module__ == "peft.tuners.lora.bnb"
    assert type(linear._layer(layers.ours)).__module__ != "peft.tuners.lora.layer"
    assert type(linear._layer(layers.ours).base_layer).__name__ == "QuantizedLinear"


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_linear_notices_a_wrong_result(matrix: str) -> None:
    layers = linear.setup_layers(linear.HIGHEST, features_out=64, features_in=64)
    with torch.no_grad():
        getattr(linear._layer(layers.ours), matrix)["default"].weight[0, 0] += 0.5
    with pytest.raises(DisagreementError, match="differ by"):
        linear.setup_case(layers, 8).check()


@pytest.mark.parametrize(
    "setup",
    [
        lambda: quantize_cases.setup_quantize(False, 64, 128),
        lambda: quantize_cases.setup_quantize(True, 64, 128),
        lambda: quantize_cases.setup_dequantize(torch.float32, 64, 128),
        lambda: quantize_cases.setup_dequantize(torch.bfloat16, 64, 128),
    ],
    ids=["single", "double", "float32", "bfloat16"],
)
def test_quantize_gives_the_peers_bytes(setup: Callable[[], Case]) -> None:
    setup().check()


def test_plans_by_layer_have_the_loss_of_layers_that_store() -> None:
    for case in layer_plans._time({**SMALL, "num_hidden_layers": 3}, 1, 8):
        case.check()
        case.ours()
        case.peer()


OPTIMIZERS = pytest.mark.parametrize("setup", [optimizer.setup_adamw, optimizer.setup_adamw_8bit])


@OPTIMIZERS
def test_optimizers_move_parameters_as_the_peers_do(setup: Callable[[int], Case]) -> None:
    case = setup(10_000)
    case.check()
    case.check()  # with moments that are no longer zero


@OPTIMIZERS
def test_optimizers_notice_a_wrong_result(setup: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    # not `step`: PyTorch wraps that of every class when an object is made, and the wrapper would outlive this test
    monkeypatch.setattr(optimizer.AdamW, "_step", lambda self, *_arguments: None)
    with pytest.raises(DisagreementError, match="what 3 steps have moved"):
        setup(10_000).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_agrees_and_notices_a_wrong_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention.setup_attention(dtype, batch=2, heads=4, kv_heads=2, tokens=33, head_dim=16)
    case.check()
    real = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args, **options: real(*args, **options) * 1.1)
    with pytest.raises(DisagreementError, match="output"):
        case.check()


def test_select_top_chooses_the_peers_values(monkeypatch: pytest.MonkeyPatch) -> None:
    case = select_top.setup_select(tensors=3, elements=1000, share=0.01)
    assert case.case == "30 of 3 x 1,000 values"
    case.check()
    monkeypatch.setattr(select_top, "select_top", lambda values, k: [torch.arange(k), *[torch.arange(0)] * 2])
    with pytest.raises(DisagreementError, match="magnitudes"):
        case.check()


@pytest.mark.parametrize(
    ("ours", "peer"), [("ours", "peer"), ("ours planned", "peer checkpointed"), ("ours without logits", "peer")]
)
def test_step_agrees_and_trains_both_sides(checkpoint: smollm2.Checkpoint, ours: str, peer: str) -> None:
    case = step.setup_step(checkpoint, batch=2, length=16, effort=ONCE, ours=ours, peer=peer)
    measurement = measure(case)
    assert case.case == "forward + backward + AdamW, batch 2 x 16, small"
    assert (measurement.unit, len(measurement.ours)) == ("s", 1)
    case.check()  # after equal steps the two models still agree


def test_a_step_in_bfloat16_agrees_and_trains_both_sides(checkpoint: smollm2.Checkpoint) -> None:
    loops = {"ours": "ours bf16", "peer": "peer bf16", "tolerance": step.BFLOAT16_TOLERANCE}
    case = step.setup_step(checkpoint, batch=2, length=16, effort=ONCE, **loops)
    measure(case)
    case.check()
    model = smollm2.LOOPS["ours bf16"](checkpoint.folder).model
    assert {parameter.dtype for parameter in peers.trainable(model).values()} == {torch.bfloat16}


def test_losses_agree(checkpoint: smollm2.Checkpoint) -> None:
    losses, differences = loss.compare_losses(checkpoint, steps=3, batch=2, length=16)
    assert (losses.quantity, differences.quantity) == (Quantity.LOSS, Quantity.DIFFERENCE)
    assert len(losses.ours) == len(differences.ours) == 3
    assert 0 <= max(differences.ours) <= 1e-4
    assert "3 steps" in differences.case


def test_packed_steps_agree_with_padded_ones(checkpoint: smollm2.Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (3, 9, 5, 7, 2, 8, 4, 6, 11)]
    examples = [{"input_ids": ids, "labels": ids} for ids in rows]
    case = packing.setup_packing(checkpoint, examples, PadRight(0))
    case.check()
    assert case.ours() == pytest.approx(case.peer(), rel=0.1)
    assert case.case.startswith("steps of 8 examples, 6 tokens each | padded, 1.71 of them")


def test_memory_runs_both_sides_in_fresh_processes(checkpoint: smollm2.Checkpoint) -> None:
    rows = memory.measure_memory(checkpoint, "freed memory returned", pairs=1, steps=1, batch=1, length=8)
    assert [row.case.split(",")[0] for row in rows] == ["peak", "peak of the steps", "after loading"]
    peak, steps, loading = rows
    for side in ("ours", "peer"):
        assert getattr(peak, side)[0] >= getattr(steps, side)[0] >= 50
        assert getattr(loading, side)[0] >= 50


def test_a_lean_step_is_the_ordinary_one(checkpoint: smollm2.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "return_freed_memory", lambda: True)  # it would hold for all tests of this process
    (ids,) = smollm2.make_batches(checkpoint.folder, 1, batch=2, length=16)
    loops = [smollm2.LOOPS[name](checkpoint.folder) for name in ("ours", "ours lean")]
    (loss, gradients), (lean_loss, lean_gradients) = (loop.loss_and_gradients(ids) for loop in loops)
    peers.check_agreement({"loss": (lean_loss, loss)}, 1e-6)
    pairs = {name: (lean_gradients[name], gradient) for name, gradient in gradients.items()}
    peers.check_agreement(pairs, 1e-5)


def test_a_step_of_a_large_shape_runs_in_a_fresh_process() -> None:
    sizes = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (measurement,) = llama8b.measure_step("freed memory returned", 1, 8, **sizes, **heads)
    assert "1 x 8 (freed memory returned)" in measurement.case
    assert 50 <= measurement.ours[0] < measurement.peer[0] == 8000.0


def test_the_large_shape_is_quantized_without_a_dense_copy_and_recomputes() -> None:
    sizes = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
    model = llama8b.random_model(**sizes, num_attention_heads=4, num_key_value_heads=2)
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    layer = model.base_model.model.model.layers[0]
    weight = layer.mlp.up_proj.base_layer
    assert weight.weight.dtype == torch.uint8
    assert 0.01 < float(weight.dequantize().float().std()) < 0.04
    reasons = [row.reason for row in peftkern.patch(model).rows if row.module.endswith(".mlp")]
    assert reasons == ["makes gate and up again in the backward pass"]


def test_a_sparse_step_agrees_with_the_reference_and_trains_deltas_alone(checkpoint: smollm2.Checkpoint) -> None:
    case = sparse_step.setup_step(checkpoint, batch=2, length=16, effort=ONCE)
    case.check()
    measurement = measure(case)
    assert case.case.startswith("sparse deltas 0.5% | LoRA r=16")
    assert len(measurement.ours) == len(measurement.peer) == 1


def test_a_sparse_step_notices_a_wrong_result(checkpoint: smollm2.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sparse_step.setup_step(checkpoint, batch=2, length=16, effort=ONCE)
    right, calls = smollm2.Loop.loss_and_gradients, iter((1.0, 1.1))

    def wrong(self: smollm2.Loop, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, gradients = right(self, ids)
        factor = next(calls)
        return loss, {name: factor * gradient for name, gradient in gradients.items()}

    monkeypatch.setattr(smollm2.Loop, "loss_and_gradients", wrong)
    with pytest.raises(DisagreementError, match="gradient of"):
        case.check()


def test_sparse_memory_runs_both_sides(checkpoint: smollm2.Checkpoint) -> None:
    rows = memory.measure_memory(
        checkpoint, "freed memory returned", pairs=1, steps=1, batch=1, length=8, ours="sparse", peer="ours"
    )
    assert all(row.ours[0] >= 50 and row.peer[0] >= 50 for row in rows)


def test_sparse_state_is_proportional_to_the_entries(checkpoint: smollm2.Checkpoint) -> None:
    rows = list(sparse_step.measure_state(checkpoint, densities=(0.01, 0.02), length=8))
    gradients, state, twice_gradients, twice_state = (row.ours[0] for row in rows)
    assert state == 2 * gradients
    assert twice_gradients == pytest.approx(2 * gradients, rel=1e-2)
    assert twice_state == pytest.approx(2 * state, rel=1e-2)
    assert gradients == pytest.approx(0.01 * rows[0].peer[0], rel=1e-2)


def test_sparse_state_notices_state_of_dense_size(
    checkpoint: smollm2.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_step, "BYTES_PER_ENTRY", {"gradients": 8})
    with pytest.raises(DisagreementError, match="proportional"):
        list(sparse_step.measure_state(checkpoint, densities=(0.01,), length=8))


@pytest.mark.parametrize("embeddings", half_step.EMBEDDINGS)
def test_a_half_step_agrees_with_full_fine_tuning(checkpoint: smollm2.Checkpoint, embeddings: str) -> None:
    case, half, full = half_step.setup_step(checkpoint, embeddings, batch=2, length=16, effort=ONCE)
    case.check()
    measure(case)
    ours, peer = half.training_bytes(), full.training_bytes()
    trained = sum(p.numel() for p in peers.trainable(half.model).values())
    assert ours == {"gradients": 4 * trained, "optimizer state": 8 * trained}
    assert peer["gradients"] == 4 * sum(p.numel() for p in full.model.parameters())


def test_peak_of_memory_can_be_read_and_reset() -> None:
    before = memory.resident_megabytes("VmRSS")
    block = torch.ones(25_000_000)
    assert memory.resident_megabytes("VmHWM") >= before + 90
    del block
    memory.reset_peak()
    assert memory.resident_megabytes("VmHWM") < before + 90


@pytest.mark.parametrize(
    ("ours", "peer", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 4.0], [0.0, 0.0], math.inf),
        ([3.0, 4.4], [3.0, 4.0], 0.08),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_relative_difference(ours: list[float], peer: list[float], expected: float) -> None:
    assert peers.relative_difference(torch.tensor(ours), torch.tensor(peer)) == pytest.approx(expected, rel=1e-5)


def test_adapters_of_different_models_are_refused() -> None:
    with pytest.raises(DisagreementError, match="same parameters"):
        peers.copy_adapter(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))


def test_batches_are_seeded_and_in_the_vocabulary(checkpoint: smollm2.Checkpoint) -> None:
    first, second = smollm2.make_batches(checkpoint.folder, 2, 3, 5)
    again, _ = smollm2.make_batches(checkpoint.folder, 2, 3, 5)
    assert first.shape == (3, 5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert int(first.max()) < SMALL["vocab_size"]


def test_missing_model_package_is_said_in_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm2, "save_random", lambda folder: (Path(folder) / "config.json").write_text("{}"))
    with smollm2.checkpoint() as found:
        assert "random weights" in found.note
        assert (Path(found.folder) / "config.json").exists()
    assert not Path(found.folder).exists()


@pytest.mark.parametrize("peer", ["dense form", "torch.sparse"])
def test_sparse_linear_agrees_with_its_peers_and_notices_a_wrong_result(peer: str) -> None:
    layer = sparse_linear.setup_layer(0.05, size=96, tokens=19)
    case = sparse_linear.setup_case(layer, peer)
    case.check()
    case.ours()
    case.peer()
    assert case.case == f"delta alone, 461 entries, 19 tokens | {peer}"
    layer.indices.columns[0] = (layer.indices.columns[0] + 1) % 96
    with pytest.raises(DisagreementError, match="y: ours"):
        case.check()


def test_sparse_linear_says_what_memory_both_sides_take() -> None:
    """Ours: panels, and for each entry its gradient and a sum for each of two blocks of tokens."""
    measurement = sparse_linear.measure_memory(0.05, size=2048, tokens=64)
    (ours,), (peer,) = measurement.ours, measurement.peer
    assert measurement.quantity is Quantity.MEMORY and "[out, in] has 16.8 MB), 209,715 entries" in measurement.case
    assert 2.0 < ours < 8 < 2 * 16.7 < peer


def test_predicted_flops_are_those_that_are_counted(
    checkpoint: smollm2.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "checkpoint", lambda: nullcontext(checkpoint))
    monkeypatch.setattr(select_prediction, "SELECTIONS", 3)
    monkeypatch.setattr(select_prediction, "ROUNDS", 1)
    flops, seconds, errors = select_prediction.cases()
    assert flops.ours == pytest.approx(flops.peer, rel=0.01)
    assert len(seconds.ours) == len(errors.ours) == 3
