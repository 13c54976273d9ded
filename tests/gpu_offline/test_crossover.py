"""Which way a product takes: the estimates, the user's measured table in front of them, and forced paths."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

from peftkern.backends.triton import crossover, devices, measured, roofline
from peftkern.backends.triton.configurations import Tile
from peftkern.backends.triton.crossover import DeviceKey, Path, Product
from peftkern.backends.triton.devices import Rates

H100 = DeviceKey("NVIDIA H100 80GB HBM3", (9, 0))
L4 = DeviceKey("NVIDIA L4", (8, 9))
Q, GATE_UP, DOWN, KEY = (4096, 4096, 1), (28672, 4096, 2), (4096, 14336, 1), (1024, 4096, 1)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    crossover.forget()
    yield
    crossover.forget()


def choose(
    shape: tuple[int, int, int],
    tokens: int,
    device: DeviceKey = H100,
    direction: roofline.Direction = "forward",
    quantized: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> crossover.Choice:
    return crossover.choose(direction, tokens, *shape, quantized, dtype, device)


# ---- the estimates


ROUND = Rates(
    (9, 0),
    "",
    "round numbers",
    1e12 / roofline.BANDWIDTH_FRACTION,
    1e15 / roofline.VENDOR_FRACTION,
    1e14,
    1e13,
    100,
    2.5e9 / roofline.ISSUE_FRACTION,
    8.0,
)
"""After the fractions: 1e12 bytes/s, 1e15 FLOP/s of the vendor, 1e12 instructions a second."""
OURS = 1e15 * roofline.OWN_FRACTION
LAUNCH = roofline.OVERHEAD
PROJECT = 16 * roofline.PROJECT_STEP
"""1000 columns in steps of 64, which takes longer than reading x."""
TILE = Tile(128, 128, 64, 8, 3)
WIDE = Product("forward", 128, 12800, 1000, 1, True, "half")
"""100 tiles, one for each multiprocessor."""
CODES, DECODED, X, Y = 12.8e6 * 0.5625, 12.8e6 * 2, 128 * 1000 * 2, 128 * 12800 * 2
MULTIPLY = 2 * 128 * 12.8e6
DECODE = 12.8e6 * 8 / 32 / 1e12


@pytest.fixture
def plain_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square tiles whatever the kernels' table says, and sums in ten parts."""
    monkeypatch.setattr(roofline, "tile_for", lambda *_arguments: TILE)
    monkeypatch.setattr(roofline, "inner_parts", lambda *_arguments: 10)


@pytest.mark.usefixtures("plain_tiles")
@pytest.mark.parametrize(
    ("path", "seconds"),
    [
        (Path.FUSED, (PROJECT + LAUNCH) + (max((CODES + X + Y) / 1e12, MULTIPLY / OURS + DECODE) + LAUNCH)),
        (
            Path.STAGED,
            ((CODES + DECODED) / 1e12 + LAUNCH) + (PROJECT + LAUNCH) + ((DECODED + X + Y) / 1e12 + LAUNCH),
        ),
        (
            Path.VENDOR,
            ((CODES + DECODED) / 1e12 + LAUNCH)
            + (PROJECT + LAUNCH)
            + (Y / 1e12 + LAUNCH)
            + ((DECODED + X + 2 * Y) / 1e12 + LAUNCH),
        ),
    ],
)
def test_an_estimate_is_the_sum_of_the_launches_it_names(path: Path, seconds: float) -> None:
    assert roofline.estimate(path, WIDE, ROUND) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.usefixtures("plain_tiles")
def test_few_tokens_write_and_read_partial_sums() -> None:
    narrow = Product("forward", 16, 1280, 1000, 1, True, "half")
    partial = 10 * 4 * 16 * 1280  # ten parts, float32
    codes, x, y = 1.28e6 * 0.5625, 16 * 1000 * 2, 16 * 1280 * 2
    slower = roofline.ISSUE_FRACTION / roofline.FEW_ISSUE_FRACTION["forward"]
    compute = 2 * 16 * 1.28e6 / OURS + slower * 1.28e6 * 8 / 32 / 1e12
    product = max((codes + x + partial) / 1e12, compute) + LAUNCH
    assert roofline.estimate(Path.FEW, narrow, ROUND) == pytest.approx(product + (partial + y) / 1e12 + 2 * LAUNCH)


@pytest.mark.usefixtures("plain_tiles")
def test_tiles_that_do_not_fill_the_device_take_as_long_as_those_that_do() -> None:
    rates = replace(ROUND, bandwidth=1e18)  # so that arithmetic is the limit
    seconds = {
        rows: roofline.estimate(Path.STAGED, Product("backward", 128 * rows, 10000, 1280, 1, False, "half"), rates)
        for rows in (9, 10, 11, 20)
    }
    assert seconds[9] == pytest.approx(seconds[10]) == pytest.approx(LAUNCH + 2 * 1280 * 1280 * 10000 / OURS)
    assert seconds[11] == pytest.approx(seconds[20]) == pytest.approx(2 * seconds[10] - LAUNCH)


def test_backward_reads_and_writes_the_result_for_every_member() -> None:
    one = Product("backward", 1, 4000, 4000, 1, False, "half")
    three = Product("backward", 1, 4000, 4000, 3, False, "half")
    more = roofline.estimate(Path.VENDOR, three, ROUND) - roofline.estimate(Path.VENDOR, one, ROUND)
    assert more == pytest.approx(2 * LAUNCH + 2 * 2 * 4000 * 2 / 1e12)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.bfloat16, "highest", "half"),
        (torch.float16, "highest", "half"),
        (torch.float32, "highest", "single"),
        (torch.float32, "high", "tf32"),
        (torch.float32, "medium", "tf32"),
    ],
)
def test_arithmetic_follows_the_dtype_and_the_precision(dtype: torch.dtype, precision: str, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert roofline.arithmetic_of(dtype) == expected
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the choice


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        (Q, 1, Path.FEW),
        (Q, 64, Path.FEW),
        (KEY, 128, Path.VENDOR),  # hardly any tiles for 132 multiprocessors
        (GATE_UP, 128, Path.FUSED),
        (Q, 2048, Path.STAGED),
        (Q, 512, Path.VENDOR),
        (DOWN, 8192, Path.STAGED),
    ],
)
def test_shipped_choices_on_an_h100(shape: tuple[int, int, int], tokens: int, expected: Path) -> None:
    assert choose(shape, tokens).path == expected


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [1, 64, 65, 512, 8192])
def test_dense_weights_are_never_decoded_in_a_product(direction: roofline.Direction, tokens: int) -> None:
    paths = {
        choose(shape, tokens, device, direction, False).path for shape in (Q, GATE_UP, KEY) for device in (H100, L4)
    }
    assert paths <= {Path.FEW, Path.STAGED, Path.VENDOR}
    assert tokens <= 64 or Path.FEW not in paths


def test_little_bandwidth_makes_decoding_inside_the_product_worth_it_for_longer() -> None:
    assert choose(Q, 1024).path == Path.STAGED
    assert choose(Q, 1024, L4).path == Path.FUSED


def test_within_the_uncertainty_fewer_launches_win() -> None:
    product = Product("forward", 2048, *Q, True, "half")
    rates = devices.rates_of(H100)
    seconds = {path: roofline.estimate(path, product, rates) for path in crossover.possible_paths(product)}
    assert min(seconds, key=seconds.__getitem__) == Path.VENDOR
    assert seconds[Path.STAGED] < seconds[Path.VENDOR] * crossover.UNCERTAINTY
    choice = choose(Q, 2048)
    assert choice.path == Path.STAGED
    assert f"{seconds[Path.STAGED] * 1e6:.0f} us, vendor {seconds[Path.VENDOR] * 1e6:.0f} us" in choice.reason
    assert "H100 SXM" in choice.reason


@pytest.mark.parametrize(
    ("name", "capability", "model"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "A100 40 GB"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "RTX 3090"),
        ("NVIDIA RTX A4000", (8, 6), "A10"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090"),
        ("NVIDIA H100 PCIe", (9, 0), "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100 SXM"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA B200", (10, 0), "B200"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "RTX 5090"),
        ("a card of tomorrow", (13, 0), "RTX 5090"),
        ("between two", (8, 7), "A10"),
        ("a card of yesterday", (7, 5), "A100 40 GB"),
    ],
)
def test_every_gpu_has_rates(name: str, capability: tuple[int, int], model: str) -> None:
    assert devices.rates_of(DeviceKey(name, capability)).model == model


def test_every_row_of_rates_can_be_reached() -> None:
    assert len({(row.capability, row.name) for row in devices.RATES}) == len(devices.RATES)
    for row in devices.RATES:
        assert devices.rates_of(DeviceKey(f"NVIDIA {row.name.removeprefix('NVIDIA ')}", row.capability)) == row


def test_tensors_without_memory_are_on_the_assumed_device() -> None:
    meta = torch.empty(1, device="meta")
    assert crossover.device_key(meta) == devices.H100
    with crossover.assumed(L4):
        assert crossover.device_key(meta) == L4
    assert crossover.device_key(meta) == devices.H100


# ---- forced paths


def test_a_forced_path_is_taken_where_it_can_run() -> None:
    for path in Path:
        with crossover.forced(path):
            assert choose(Q, 64) == crossover.Choice(path, "forced")
    assert choose(Q, 64).reason != "forced"


@pytest.mark.parametrize(("path", "tokens", "quantized"), [(Path.FEW, 65, True), (Path.FUSED, 1, False)])
def test_a_forced_path_that_cannot_run_leaves_the_choice_to_the_table(path: Path, tokens: int, quantized: bool) -> None:
    expected = choose(Q, tokens, quantized=quantized)
    with crossover.forced(path):
        assert choose(Q, tokens, quantized=quantized) == expected


# ---- the user's table


def row(shape: tuple[int, int, int] = Q, path: Path = Path.VENDOR, **changes: Any) -> measured.Row:
    out_features, in_features, members = shape
    fields: dict[str, Any] = {
        "direction": "forward",
        "out_features": out_features,
        "in_features": in_features,
        "members": members,
        "quantized": True,
        "arithmetic": "half",
        "bands": (measured.Band(16, Path.FEW), measured.Band(300, Path.FUSED), measured.Band(None, path)),
    }
    return measured.Row(**{**fields, **changes})


def save(*rows: measured.Row) -> FilePath:
    file = measured.save(rows, H100)
    crossover.forget()
    return file


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, Path.FEW), (16, Path.FEW), (17, Path.FUSED), (300, Path.FUSED), (301, Path.VENDOR), (10**6, Path.VENDOR)],
)
def test_a_measured_table_decides(tokens: int, expected: Path) -> None:
    save(row())
    choice = choose(Q, tokens)
    assert (choice.path, choice.reason) == (expected, "measured on this GPU at 4096 x 4096")


def test_the_nearest_measured_shape_decides_unless_it_is_far() -> None:
    save(row((4096, 4096, 1), Path.VENDOR), row((512, 4096, 1), Path.STAGED))
    assert choose((2048, 4096, 1), 400).reason == "measured on this GPU at 4096 x 4096"
    assert choose((1024, 4096, 1), 400).reason == "measured on this GPU at 512 x 4096"
    assert choose((4096 * 4, 4096 * 2, 1), 400).reason.startswith("estimated")


@pytest.mark.parametrize(
    "changes",
    [{"direction": "backward"}, {"members": 3}, {"quantized": False}, {"arithmetic": "tf32"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_row_of_another_kind_of_product_decides_nothing(changes: dict[str, Any]) -> None:
    save(row(**changes))
    assert choose(Q, 400).reason.startswith("estimated")


def test_a_measured_path_that_cannot_run_here_leaves_the_choice_to_the_estimates() -> None:
    save(row(bands=(measured.Band(None, Path.FEW),)))
    assert choose(Q, 64).path == Path.FEW
    assert choose(Q, 65).reason.startswith("estimated")


def test_saving_keeps_the_rows_of_other_products() -> None:
    save(row(), row((1024, 4096, 1)))
    save(row(path=Path.STAGED))
    assert choose(Q, 400).path == Path.STAGED
    assert choose((1024, 4096, 1), 400).path == Path.VENDOR


def test_an_assumed_device_has_no_measured_table() -> None:
    save(row(bands=(measured.Band(None, Path.VENDOR),)))
    assert choose(Q, 1, DeviceKey(H100.name, H100.capability, assumed=True)).reason.startswith("estimated")


def rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[FilePath], None]:
    def apply(file: FilePath) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def bands(*limits: Any) -> Callable[[FilePath], None]:
    new = [{"up_to": limit, "path": "fused"} for limit in limits]
    return rewrite(lambda content: content["rows"][0].update(bands=new))


DAMAGE: dict[str, Callable[[FilePath], object]] = {
    "empty": lambda file: file.write_text(""),
    "cut short": lambda file: file.write_text(file.read_text()[:-40]),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda file: file.write_text("[]"),
    "no rows": rewrite(lambda content: content.pop("rows")),
    "unknown path": rewrite(lambda content: content["rows"][0]["bands"][0].update(path="teleport")),
    "unknown field": rewrite(lambda content: content["rows"][0].update(colour="red")),
    "field missing": rewrite(lambda content: content["rows"][0].pop("members")),
    "size of zero": rewrite(lambda content: content["rows"][0].update(in_features=0)),
    "no bands": bands(),
    "last band closed": bands(16, 300),
    "bands that fall": bands(300, 16, None),
    "open band in the middle": bands(16, None, None),
    "limit that is text": bands("16", None),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}

STALE: dict[str, Callable[[FilePath], object]] = {
    "torch": rewrite(lambda content: content.update(torch="1.0")),
    "triton": rewrite(lambda content: content.update(triton="1.0")),
    "peftkern": rewrite(lambda content: content.update(peftkern="0.0")),
    "device": rewrite(lambda content: content.update(device="NVIDIA L4")),
    "capability": rewrite(lambda content: content.update(capability=[8, 9])),
    "layout": rewrite(lambda content: content.update(layout=0)),
}


@pytest.mark.parametrize("name", [*DAMAGE, *STALE])
def test_a_corrupt_or_stale_table_is_ignored_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = choose(Q, 400)
    file = save(row())
    assert choose(Q, 400).reason.startswith("measured")
    {**DAMAGE, **STALE}[name](file)
    crossover.forget()
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        assert choose(Q, 400) == expected
        assert choose(GATE_UP, 400).reason.startswith("estimated")
    (record,) = caplog.records
    message = record.getMessage()
    assert str(file) in message
    assert "`peftkern tune`" in message
    assert name not in STALE or name in message


def test_no_table_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    assert choose(Q, 400).reason.startswith("estimated")
    assert not caplog.records


def test_a_table_that_cannot_be_written_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(row())
    before = file.read_bytes()

    def refuse(*_args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        measured.save([row(path=Path.STAGED)], H100)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_choosing_imports_no_compiler() -> None:
    code = (
        "import sys, torch; from peftkern.backends.triton import crossover;"
        "crossover.choose('forward', 8, 64, 64, 1, True, torch.bfloat16, crossover.DeviceKey('NVIDIA L4', (8, 9)));"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
