"""How fast this machine's CPU is, measured once in a second or two and kept in the user's cache."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from peftkern._version import __version__
from peftkern.ops import lora_linear, quantize
from peftkern.plan.devices import Rates
from peftkern.user_cache import cache_folder

_REPEATS = 5
_TOKENS, _FEATURES = 256, 1024
_DTYPES = (torch.float32, torch.bfloat16)


def cpu_rates() -> Rates:
    """Measured before, or now."""
    path, key = cache_folder() / "plan-cpu.json", _machine()
    known = _read(path)
    if key not in known:
        known[key] = _measure()
        with suppress(OSError):  # a cache that cannot be written is no reason not to plan
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return Rates(**known[key])


def _machine() -> str:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {threads} threads, {precision}, torch {torch.__version__}, peftkern {__version__}"


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}


def _measure() -> dict[str, Any]:
    with torch.no_grad():
        products = {_name(dtype): _product(dtype) for dtype in _DTYPES}
        packed = {_name(dtype): _packed(dtype) for dtype in _DTYPES}
        for rates in (products, packed):
            rates["float16"] = rates["bfloat16"]
        return {
            "products": products,
            "packed": packed,
            "attention": _attention(),
            "pointwise": _pointwise(),
            "bandwidth": _bandwidth(),
            "launch": _launch(),
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


_PRODUCT = 2.0 * _TOKENS * _FEATURES * _FEATURES  # FLOPs


def _product(dtype: torch.dtype) -> float:
    x, weight = torch.randn(_TOKENS, _FEATURES).to(dtype), torch.randn(_FEATURES, _FEATURES).to(dtype)
    return _PRODUCT / _seconds(lambda: x @ weight)


def _packed(dtype: torch.dtype) -> float:
    x, weight = torch.randn(_TOKENS, _FEATURES).to(dtype), quantize(torch.randn(_FEATURES, _FEATURES), "nf4")
    return _PRODUCT / _seconds(lambda: lora_linear(x, weight))


def _attention() -> float:
    heads, length, size = 4, 512, 64
    q, k, v = torch.randn(3, 1, heads, length, size)
    attend = torch.nn.functional.scaled_dot_product_attention
    return 4.0 * heads * length * length * size / _seconds(lambda: attend(q, k, v))


_LARGE = 4 << 20


def _pointwise() -> float:
    x = torch.randn(_LARGE // 1024, 1024)
    return 5.0 * x.numel() / _seconds(lambda: x.softmax(-1))


def _bandwidth() -> float:
    # with a new result each time, as operators make it: its pages have to be mapped first
    x, y = torch.randn(2, _LARGE)
    return 12.0 * _LARGE / _seconds(lambda: x + y)


_ADDITIONS = 200


def _launch() -> float:
    x = torch.randn(16)
    return _seconds(lambda: [x + x for _ in range(_ADDITIONS)]) / _ADDITIONS
