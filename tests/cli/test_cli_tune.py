"""``peftkern tune``: what is measured, what follows from it, and the file that later runs read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import ClassVar

import pytest
import torch
from cli_helpers import Command, file_size_limit, save_model

from peftkern.backends.triton import crossover, launch
from peftkern.backends.triton.crossover import DeviceKey, Path
from peftkern.backends.triton.measured import Band
from peftkern.cli import tune as tune_command
from peftkern.tune import run, shapes
from peftkern.tune.errors import TuneError
from peftkern.tune.measure import OnDevice, fit
from peftkern.tune.operands import Subject
from peftkern.tune.shapes import Group

GPU = DeviceKey("NVIDIA H100 80GB HBM3", (9, 0))


class Clock:
    """Instead of a GPU: a straight line for each path, in microseconds."""

    LINES: ClassVar = {Path.FEW: (5, 1.0), Path.FUSED: (20, 0.5), Path.STAGED: (70, 0.1), Path.VENDOR: (69.9, 0.1)}

    def __init__(self, *_arguments: object) -> None:
        self.asked: list[tuple[str, str, int, Path]] = []

    def __call__(self, subject: Subject, direction: str, tokens: int, path: Path) -> float:
        self.asked.append((str(subject.group), direction, tokens, path))
        start, slope = self.LINES[path]
        return (start + slope * tokens) / 1e6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "require_gpu", lambda: GPU)
    monkeypatch.setattr(tune_command, "OnDevice", lambda *_arguments: clock)
    crossover.forget()
    yield clock
    crossover.forget()


def choose(tokens: int, outputs: int = 4096, inputs: int = 4096, members: int = 1) -> crossover.Choice:
    return crossover.choose("forward", tokens, outputs, inputs, members, True, torch.bfloat16, GPU)


# ---- the command


def test_without_a_gpu_it_says_so(command: Command) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = command("tune")
    assert result.exit_code == 1
    assert "there is no GPU to measure" in result.output


def test_what_was_measured_decides_from_then_on(command: Command, gpu: Clock, tmp_path: FilePath) -> None:
    result = command("tune", "--shape", "4096x4096", "--tokens", "1,16,64,128,1024")
    assert result.exit_code == 0, result.output
    assert "few to 32, fused to 362, staged" in result.output
    assert str(tmp_path / "cache" / "crossover.json") in result.output
    assert [choose(tokens).path for tokens in (32, 33, 362, 363)] == [Path.FEW, Path.FUSED, Path.FUSED, Path.STAGED]
    assert "measured on this GPU" in choose(8).reason


def test_every_path_that_can_run_is_timed_in_both_directions(command: Command, gpu: Clock) -> None:
    command("tune", "--shape", "64+32x96", "--tokens", "64,65", "--format", "dense")
    expected = [(64, Path.FEW), (64, Path.STAGED), (64, Path.VENDOR), (65, Path.STAGED), (65, Path.VENDOR)]
    for direction in ("forward", "backward"):
        asked = [(tokens, path) for _, way, tokens, path in gpu.asked if way == direction]
        assert asked == expected
    assert {group for group, *_ in gpu.asked} == {"64+32x96"}


def test_another_tuning_keeps_what_the_first_one_found(command: Command, gpu: Clock, tmp_path: FilePath) -> None:
    command("tune", "--shape", "4096x4096", "--tokens", "128")
    command("tune", "--shape", "4096x4096", "--tokens", "128", "--dtype", "float32")
    command("tune", "--shape", "1024x4096", "--tokens", "128")
    rows = json.loads((tmp_path / "cache" / "crossover.json").read_text())["rows"]
    assert [(row["out_features"], row["arithmetic"]) for row in rows[::2]] == [
        (4096, "half"),
        (4096, "single"),
        (1024, "half"),
    ]


def test_the_layers_of_a_model(command: Command, gpu: Clock, tmp_path: FilePath) -> None:
    folder = save_model(tmp_path / "model")
    assert command("tune", str(folder), "--tokens", "128").exit_code == 0
    assert {group for group, *_ in gpu.asked} == {"64+32+32x64", "64x64", "96+96x64", "64x96"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "--shape must be OUTxIN"),
        (["--shape", "4096x0"], "--shape must be OUTxIN"),
        (["--shape", "64+0x64"], "--shape must be OUTxIN"),
        (["--shape", "-64x64"], "--shape must be OUTxIN"),
        (["--shape", "64xx64"], "--shape must be OUTxIN"),
        (["--tokens", "1,zwei"], "--tokens must be positive numbers"),
        (["--tokens", "0,1"], "--tokens must be positive numbers"),
        (["--format", "int2"], "--format must be one of dense, fp4, int8, int8_blockwise, nf4"),
        (["--dtype", "float64"], "--dtype must be one of bfloat16, float16, float32"),
        (["nowhere", "--shape", "64x64"], "either MODEL or --shape"),
        (["/nowhere/at/all"], "MODEL: the configuration of '/nowhere/at/all' cannot be read"),
    ],
)
def test_what_cannot_be_asked_for(command: Command, gpu: Clock, arguments: Sequence[str], message: str) -> None:
    result = command("tune", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not gpu.asked


def test_a_file_that_cannot_be_written(command: Command, gpu: Clock) -> None:
    with file_size_limit(16):
        result = command("tune", "--shape", "64x64", "--tokens", "128")
    assert result.exit_code == 1
    assert "PEFTKERN_CACHE names another folder" in " ".join(result.output.split())


# ---- where one path overtakes another


@pytest.mark.parametrize(
    ("seconds", "bands"),
    [
        ({8: {"few": 1.0, "fused": 2.0}, 128: {"fused": 1.0, "staged": 2.0}}, [(32, "few"), (None, "fused")]),
        ({64: {"few": 1.0, "fused": 2.0}, 256: {"fused": 1.0, "staged": 2.0}}, [(64, "few"), (None, "fused")]),
        ({128: {"fused": 1.01, "staged": 1.0}}, [(None, "fused")]),  # within the noise: fewer launches
        ({128: {"fused": 1.03, "staged": 1.0}}, [(None, "staged")]),
        (
            {
                512: {"staged": 2.0, "vendor": 1.0},
                128: {"staged": 1.0, "vendor": 2.0},
                256: {"staged": 1.0, "vendor": 2.0},
            },
            [(362, "staged"), (None, "vendor")],
        ),
    ],
)
def test_bands(seconds: dict[int, dict[str, float]], bands: list[tuple[int | None, str]]) -> None:
    times = {tokens: {Path(path): value for path, value in row.items()} for tokens, row in seconds.items()}
    assert fit(times) == tuple(Band(limit, Path(path)) for limit, path in bands)


# ---- the calls that are timed


class OneCallEach:
    """Calls everything once; on tensors without memory that only counts the launches."""

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        return float(len(calls))

    def copies(self, bytes_touched: int) -> int:
        assert bytes_touched > 0
        return 3


@pytest.mark.parametrize("format", ["nf4", "int8", None])
@pytest.mark.parametrize(
    ("direction", "path", "kernels"),
    [
        ("forward", Path.FEW, {"few_tokens_kernel"}),
        ("forward", Path.STAGED, {"project_kernel", "product_kernel"}),
        ("backward", Path.STAGED, {"pull_kernel", "input_gradient_kernel"}),
        ("backward", Path.VENDOR, {"pull_kernel", "input_gradient_kernel"}),
    ],
)
def test_the_forced_path_is_what_is_timed(format: str | None, direction: str, path: Path, kernels: set[str]) -> None:
    subject = Subject(Group((512, 256), 256), format, torch.bfloat16, rank=8)
    with launch.recording() as launches:
        assert OnDevice(OneCallEach(), "meta")(subject, direction, 48, path) == 3.0  # type: ignore[arg-type]
    names = {one.kernel for one in launches}
    assert kernels <= names
    decodes = any("dequantize" in name for name in names)
    assert decodes == (format is not None and path != Path.FEW)


def test_shapes_are_read_as_they_are_written() -> None:
    for group in shapes.LLAMA_3_8B:
        assert shapes.parse(str(group)) == group
    with pytest.raises(TuneError, match="--shape"):
        shapes.parse("")
