"""The check for a GPU, without one: what it would run, its arithmetic, its report, and its stages on stand-ins."""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import peftkern.backends.triton as triton_backend
from peftkern.backends import registry
from peftkern.backends.triton import crossover, devices, launch
from peftkern.gpu_check import __main__ as command
from peftkern.gpu_check import build, numerics, peers, plan, processes, run
from peftkern.gpu_check.errors import CheckError
from peftkern.gpu_check.items import Bench, Conversion, Gate, GatedBackward, Item, Kernels, Operation
from peftkern.gpu_check.report import Report
from peftkern.gpu_check.rows import Row
from peftkern.gpu_check.training_items import (
    Importance,
    MaskedProduct,
    Selection,
    SparseProduct,
    TrainingItem,
    Update,
)
from peftkern.tune.operands import Subject
from peftkern.tune.shapes import Group
from peftkern.tune.timer import CudaTimer

ROOT = Path(__file__).parents[2]
H100 = devices.DeviceKey("NVIDIA H100 80GB HBM3", (9, 0))
RATES = devices.rates_of(H100)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class OneCallEach:
    """Instead of a GPU's clock: calls everything once; each call takes a millisecond."""

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        return 1e-3

    def copies(self, _bytes_touched: int) -> int:
        return 2


class NoCalls(OneCallEach):
    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        assert calls
        return 1e-3


def on_cpu(*names: str) -> Bench:
    return Bench(OneCallEach(), "cpu", names, backend="reference")


# ---- the dry run


@pytest.fixture(scope="module")
def planned() -> list[tuple[Item, list[str]]]:
    return [(item, [launched.kernel for launched in item.launches()]) for item in plan.items()]


@needs_triton
def test_every_kernel_is_timed(planned: list[tuple[Item, list[str]]]) -> None:
    for module in pkgutil.iter_modules(triton_backend.__path__):
        importlib.import_module(f"{triton_backend.__name__}.{module.name}")
    everywhere = {
        name
        for module_name, module in list(sys.modules.items())
        if module_name.startswith(triton_backend.__name__)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    timed = {kernel for item, kernels in planned for kernel in kernels if not isinstance(item, Operation)}
    assert everywhere <= timed


@needs_triton
def test_every_path_is_timed_in_both_directions(planned: list[tuple[Item, list[str]]]) -> None:
    forced = {(item.direction, item.path) for item, _ in planned if isinstance(item, Operation) and item.path}
    assert forced == {(way, path) for way in ("forward", "backward") for path in crossover.Path}


@needs_triton
def test_the_dry_run_needs_nothing_but_torch_and_triton() -> None:
    """What a bare GPU machine may lack, and what must not be touched without a GPU."""
    program = (
        "import sys, runpy\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('bitsandbytes', 'gguf', 'datasets', 'transformers', 'peft', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util; found = importlib.util.find_spec\n"
        "def find(name, *rest):\n"
        "    try: return found(name, *rest)\n"
        "    except ModuleNotFoundError: return None\n"
        "importlib.util.find_spec = find\n"
        "sys.argv = ['gpu_check', '--dry-run']\n"
        "runpy.run_module('peftkern.gpu_check', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for text in ("stage 1", "stage 2", "stage 3", "stage 4", "product_kernel", "8192 tokens", "of timing on an H100"):
        assert text in result.stdout
    assert "not compared with PEFT + bitsandbytes: peft and bitsandbytes cannot be imported" in result.stdout


@without_gpu
def test_without_a_gpu_only_the_dry_run_succeeds() -> None:
    result = subprocess.run([sys.executable, "-m", "peftkern.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no GPU to check" in result.stderr
    assert "--dry-run" in result.stderr


# ---- what is timed


SMALL = Group((64, 32), 64)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("format", ["nf4", "int8", None])
def test_an_operation_is_compared_with_float64_and_timed_beside_its_peers(direction: Any, format: str | None) -> None:
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package)
    operation = Operation(Subject(SMALL, format, torch.float32), 8, direction)
    (row,) = operation.rows(on_cpu(*peers.names()))
    assert row.error is not None
    assert 0 < row.error <= 5e-6
    assert row.right
    assert tuple(row.peers) == peers.OF_PRODUCTS
    assert (row.shape, row.tokens, row.seconds) == ("64+32x64", 8, 1e-3)


def test_bytes_and_flops_of_an_operation() -> None:
    forward, backward = (
        next(Operation(Subject(SMALL, None, torch.float32), 8, way).rows(on_cpu())) for way in ("forward", "backward")
    )
    weights, x, y = 4 * 96 * 64, 4 * 8 * 64, 4 * 8 * 96
    assert forward.moved == weights + x + y
    assert backward.moved == weights + 2 * x + y
    adapters = 2 * 8 * 16 * (2 * 64 + 96)
    assert forward.flops == 2 * 8 * 96 * 64 + adapters
    assert backward.flops == 2 * 8 * 96 * 64 + 2 * adapters


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_wrong_number_makes_the_row_wrong(direction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true_run = registry.run

    def spoilt(operation: str, *args: Any, **kwargs: Any) -> Any:
        result = true_run(operation, *args, **kwargs)
        if not operation.startswith("lora_linear_group"):
            return result
        wrong = result[0][1] if operation == "lora_linear_group" else result[0]
        if wrong.dtype == torch.float32:  # not the exact one
            wrong[3, 5] += 1
        return result

    monkeypatch.setattr(registry, "run", spoilt)
    (row,) = Operation(Subject(SMALL, "nf4", torch.float32), 8, direction).rows(on_cpu())
    assert not row.right


def test_the_native_product_is_compared_with_float64() -> None:
    (row,) = Operation(Subject(Group((64,), 64), "nf4", torch.float32), 8, "forward", native=True).rows(on_cpu())
    assert row.kernel == "forward nf4 (cuda)"
    assert row.error is not None
    assert 0 < row.error <= 5e-6


@pytest.mark.parametrize(("direction", "tensors"), [("forward", 3), ("backward", 5)])
def test_gates_are_compared_with_float64(direction: Any, tensors: int) -> None:
    (row,) = Gate(8, 32, torch.float32, direction).rows(on_cpu())
    assert row.error is not None
    assert 0 < row.error <= 5e-6
    assert row.moved == tensors * 4 * 8 * 32


def test_the_gated_backward_is_compared_with_float64() -> None:
    (row,) = GatedBackward(Subject(Group((64,), 96), "nf4", torch.float32), 8).rows(on_cpu())
    assert row.error is not None
    assert 0 < row.error <= 5e-6
    weights, grad, gate = 64 * 96 // 2 + 4 * 64 * 96 // 64, 4 * 8 * 64, 4 * 8 * 96
    assert row.moved == weights + grad + 4 * gate


@needs_triton
def test_each_kernel_of_an_operation_is_a_row() -> None:
    kernels = Kernels(Operation(Subject(SMALL, "nf4", torch.bfloat16), 8, "forward", crossover.Path.STAGED))
    with launch.recording():
        rows = list(kernels.rows(Bench(NoCalls(), "meta", [])))
    assert [row.kernel for row in rows] == [launched.kernel for launched in kernels.launches()]
    assert "product_kernel" in [row.kernel for row in rows]
    assert all(row.moved > 0 for row in rows)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("operation", ["quantize", "dequantize"])
def test_conversions_are_compared_bit_by_bit(
    operation: str, format: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = Conversion(operation, format, (64, 128), torch.bfloat16, "triton", double_quant)
    (row,) = conversion.rows(on_cpu())
    assert row.error == 0.0
    assert row.right
    scales = 128 + 4 + 4 if double_quant else 4 * 128
    assert row.moved == 2 * 64 * 128 + 64 * 128 // 2 + scales
    true_run = registry.run

    def flipped(*args: Any, **kwargs: Any) -> Any:
        result = true_run(*args, **kwargs)
        (result if isinstance(result, torch.Tensor) else result.packed).view(torch.uint8)[0, 0] ^= 1
        return result

    monkeypatch.setattr(registry, "run", flipped)
    (row,) = conversion.rows(on_cpu())
    assert row.error is not None
    assert row.error > 0
    assert not row.right


# ---- what sparse training runs

_UPDATES = ((32, torch.float32), (32, torch.bfloat16), (8, torch.bfloat16))
TRAINING = [
    *(
        kind((48, 64), 0.1, 8, torch.float32, way)
        for kind in (SparseProduct, MaskedProduct)
        for way in ("forward", "backward")
    ),
    *(Update((16, 256), bits, dtype, kept) for bits, dtype in _UPDATES for kept in (None, 0.2)),
    *(Update((16, 256), bits, torch.bfloat16, kept, probe=True) for bits in (32, 8) for kept in (None, 0.2)),
    Selection((30, 40), 0.05, torch.bfloat16),
    Selection((30, 40), 0.05, torch.float32, excluded=0.2),
    *(Importance((30, 40), over, torch.float32) for over in ("entries", "rows", "all", "probe")),
]


@pytest.mark.parametrize("item", TRAINING, ids=lambda item: item.title)
def test_a_training_item_is_compared_and_timed_beside_its_peers(item: TrainingItem) -> None:
    on_any_device = [name for name in item.peers if name != peers.BITSANDBYTES]
    (row,) = item.rows(on_cpu(*on_any_device))
    assert row.error is not None
    assert row.right, row
    assert list(row.peers) == on_any_device
    assert row.moved > 0


@pytest.mark.parametrize("item", TRAINING, ids=lambda item: item.title)
def test_a_wrong_result_of_a_training_item_is_found(item: TrainingItem, monkeypatch: pytest.MonkeyPatch) -> None:
    true_run = type(item)._run

    def spoilt(self: TrainingItem, operands: Any, backend: str) -> list[torch.Tensor]:
        results = true_run(self, operands, "reference")
        if backend == "cpu":
            results[-1].view(-1)[-1:] += 1
        return results

    monkeypatch.setattr(type(item), "_run", spoilt)
    (row,) = item.rows(Bench(OneCallEach(), "cpu", (), backend="cpu"))
    assert not row.right


@pytest.mark.parametrize("kind", [SparseProduct, MaskedProduct])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_peers_of_training_items_compute_the_same(kind: Any, direction: Any) -> None:
    item = kind((48, 64), 0.3, 8, torch.float32, direction)
    operands = item._make("cpu")
    exact = item._exact(operands)
    for name in item.peers:
        found = item._peer(name, operands)()
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        compared = list(zip(found, exact, strict=True))
        if kind is SparseProduct and direction == "backward":
            compared[1] = (found[1] * 2.0, exact[1])  # its scaling is none of the product's
        if kind is MaskedProduct and name == peers.CUBLAS:
            compared = compared[:1]  # nor is masking the gradient
        assert all(torch.allclose(one.double(), other, atol=1e-4) for one, other in compared), name


def test_the_peer_of_an_update_computes_the_same() -> None:
    item = Update((16, 256), 32, torch.float32)
    operands = item._make("cpu")
    expected = item._exact(operands)[0]
    item._peer(peers.TORCH, operands)()
    torch.testing.assert_close(operands["parameter"], expected)


# ---- the timer


class Gpu:
    """A clock that calls advance, and events that read it."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.log: list[str] = []

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.milliseconds)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def call(self, name: str, milliseconds: Iterator[float]) -> Callable[[], None]:
        def run_it() -> None:
            self.log.append(name)
            self.milliseconds += next(milliseconds)

        return run_it


def test_the_timer_takes_the_median_of_rounds_over_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _cycles: gpu.log.append("wait"))

    def durations() -> Iterator[float]:
        yield from [1000.0, 500.0]  # compiles, warms up
        yield from [2.0, 2.0, 90.0, 90.0, 3.0, 3.0]  # three rounds of two turns

    seconds = CudaTimer(rounds=3, least_calls=4).seconds([gpu.call("a", durations()), gpu.call("b", durations())])
    assert seconds == pytest.approx(3e-3)
    assert gpu.log == ["a", "b", "synchronize", "a", "b", "synchronize", *["wait", *"abab"] * 3, "synchronize"]


# ---- time limit, failures


def item(title: str, rows: Sequence[Row] = (), error: Exception | None = None) -> Any:
    def timed(_bench: Bench) -> Iterator[Row]:
        if error is not None:
            raise error
        yield from rows

    return SimpleNamespace(title=title, launches=list, rows=timed)


def row(**changes: Any) -> Row:
    fields: dict[str, Any] = {"kernel": "k", "shape": "1x1", "tokens": 1, "seconds": 1.0, "moved": 1, "flops": 0}
    return Row(**{**fields, **changes})


def empty_report() -> Report:
    report = Report(H100.name, RATES, {"torch": "2.11"})
    report.build = build.Build(1.0, None, build.MODULES)
    report.numerics = numerics.Numerics(1.0, {"passed": 3}, ())
    return report


def test_when_time_is_up_nothing_starts_and_what_is_missing_is_named() -> None:
    report, said = empty_report(), list[str]()
    run.time_items([item("first", [row()])], on_cpu(), report, run.Limit(60), said.append)
    run.time_items([item("second", [row()]), item("third")], on_cpu(), report, run.Limit(0), said.append)
    assert len(report.rows) == len(said) == 1
    assert report.skipped == ["second", "third"]
    assert "2 of 2 items were not timed" in report.notes[0]
    assert report.passed


def test_a_kernel_that_fails_hides_no_other() -> None:
    report = empty_report()
    items = [item("bad", error=RuntimeError("illegal address")), item("good", [row()])]
    run.time_items(items, on_cpu(), report, run.Limit(60), lambda _text: None)
    assert report.failures == ["bad: RuntimeError: illegal address"]
    assert len(report.rows) == 1
    assert not report.passed


# ---- figures and report


def test_figures_of_a_row() -> None:
    bound_by_memory = row(seconds=1e-3, moved=RATES.bandwidth * 5e-4, flops=RATES.half * 2e-4, peers={"cuBLAS": 2e-3})
    data = bound_by_memory.as_data(RATES)
    assert data["us"] == pytest.approx(1000)
    assert data["tb_per_s"] == pytest.approx(RATES.bandwidth / 2 / 1e12)
    assert data["tflop_per_s"] == pytest.approx(RATES.half / 5 / 1e12)
    assert data["roofline_fraction"] == pytest.approx(0.5)
    assert data["peers"] == {"cuBLAS": {"us": pytest.approx(2000), "ratio": pytest.approx(2.0)}}
    single = row(seconds=1e-3, moved=1, flops=RATES.single * 2e-4, arithmetic="single")
    assert single.roofline_fraction(RATES) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("error", "right"), [(None, True), (0.0, True), (1e-3, True), (2e-3, False), (math.nan, False)]
)
def test_errors_beyond_the_limit_are_wrong(error: float | None, right: bool) -> None:
    assert row(error=error, limit=1e-3).right is right


def test_the_report_in_both_forms(tmp_path: Path) -> None:
    report = empty_report()
    report.rows = [
        row(kernel="product_kernel", tokens=2048, seconds=1e-4, moved=10**8, flops=10**10, peers={"cuBLAS": 2e-4}),
        row(kernel="quantize", tokens=None, error=math.inf, limit=0.0),
    ]
    report.skipped = ["something"]
    report.write(tmp_path / "new" / "folder")
    data = json.loads((tmp_path / "new" / "folder" / "gpu-check.json").read_text())
    assert data["passed"] is False
    assert data["rows"][1]["right"] is False
    markdown = (tmp_path / "new" / "folder" / "gpu-check.md").read_text()
    assert "FAILED" in markdown.splitlines()[0]
    assert "| product_kernel | 1x1 | 2048 | 100.0 | 1.00 | 100 | 30% |  | 2.00 |" in markdown
    assert "| quantize | 1x1 |  |" in markdown
    assert "WRONG" in markdown
    assert "* something" in markdown


# ---- processes, tests, build


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process_id}/stat").read_text().split(") ")[1][0] != "Z"


def test_shares_run_side_by_side_whatever_they_print(tmp_path: Path) -> None:
    program = "import sys; print('x' * 300_000); print(sys.argv[1])"
    finished = processes.run_shares(["-c", program], 3, tmp_path, 60)
    assert [one.code for one in finished] == [0, 0, 0]
    assert [one.tail(1) for one in finished] == ["1/3", "2/3", "3/3"]


def test_a_process_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    finished = processes.run([sys.executable, "-c", program], tmp_path, 3)
    assert finished.code is None
    child = int(finished.output)
    for _ in range(50):
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


@pytest.fixture
def small_checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--part')\n")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "right", "counts"),
    [
        ("def test_a(): pass\ndef test_b(): pass", True, {"passed": 4}),
        ("def test_a(): pass\ndef test_b(): assert 0", False, {"passed": 2, "failed": 2}),
        ("import nothing_of_this_name", False, {"error": 2}),
        ("", False, {}),
        ("import os\ndef test_a(): os._exit(3)", False, {}),
        ("import time\ndef test_a(): time.sleep(60)", False, {}),
    ],
    ids=["good", "failing", "unreadable", "none", "crash", "endless"],
)
def test_what_the_tests_say(small_checkout: Path, code: str, right: bool, counts: dict[str, int]) -> None:
    (small_checkout / "tests" / "gpu" / "test_it.py").write_text(code)
    log = small_checkout / "tests.log"
    found = numerics.run(small_checkout, 2, 8 if "sleep" in code else 120, log)
    assert ("in test_b" in log.read_text() or "def test_b" in log.read_text()) is ("assert 0" in code)
    assert found.right is right
    assert found.counts == counts
    assert bool(found.failures) is (not right and code != "")


@pytest.mark.parametrize(
    ("script", "timeout", "failure"),
    [
        ("import os; assert os.environ['PEFTKERN_CUDA_ARCHITECTURES'] == '90-real'", 60, None),
        ("import sys; sys.exit('no compiler')", 60, "no compiler"),
        ("import time; time.sleep(60)", 1, "not done after 1 s"),
    ],
    ids=["good", "bad", "slow"],
)
def test_the_build(
    tmp_path: Path, script: str, timeout: float, failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").write_text(script)
    monkeypatch.setattr(build, "MODULES", ("_version",))
    found = build.build(tmp_path, Path("build"), (9, 0), timeout)
    assert (found.failure is None) is (failure is None)
    assert failure is None or failure in str(found.failure)


def test_a_module_that_was_not_built_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.py").write_text("print('no nvcc')")
    monkeypatch.setattr(build, "MODULES", ("_version", "_nowhere"))
    found = build.build(tmp_path, Path("build"), (9, 0), 60)
    assert found.modules == ("_version",)
    assert "_nowhere" in str(found.failure)
    assert "no nvcc" in str(found.failure)


def test_it_runs_from_a_checkout_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run.checkout() == ROOT
    monkeypatch.setattr(run.peftkern, "__file__", str(tmp_path / "peftkern" / "__init__.py"))
    with pytest.raises(CheckError, match="run this from a checkout"):
        run.checkout()


# ---- all stages


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every stage replaced by a note that it ran, and a plan of one small operation on the CPU."""
    ran: list[str] = []
    report = empty_report()

    def note(name: str, result: Any) -> Callable[..., Any]:
        return lambda *_arguments: (ran.append(name), result)[1]

    monkeypatch.setattr(run, "require_gpu", lambda: H100)
    monkeypatch.setattr(build, "build", note("build", report.build))
    monkeypatch.setattr(numerics, "run", note("tests", report.numerics))
    monkeypatch.setattr(run, "run_shares", note("compile", [processes.Finished(0, "")]))
    monkeypatch.setattr(run, "CudaTimer", OneCallEach)
    monkeypatch.setattr(run, "Bench", lambda timer, _device, names: Bench(timer, "cpu", names, backend="reference"))
    monkeypatch.setattr(peers, "names", lambda: [peers.CUBLAS])
    monkeypatch.setattr(plan, "items", lambda: [Operation(Subject(SMALL, "nf4", torch.float32), 4, "forward")])
    return ran


@needs_triton
def test_all_stages_in_order(stages: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(command.app, ["--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert stages == ["build", "tests", "compile"]
    data = json.loads((tmp_path / "gpu-check.json").read_text())
    assert data["passed"] is True
    assert [one["kernel"] for one in data["rows"]] == ["forward nf4 (path by the table)"]


@needs_triton
@pytest.mark.usefixtures("stages")
def test_failing_tests_fail_the_check_and_the_timings_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "run", lambda *_: numerics.Numerics(1.0, {"passed": 3}, ("FAILED test_it",)))
    result = CliRunner().invoke(command.app, ["--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAILED test_it" in result.output
    assert json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
