"""A plugin of pytest: what tests run on the CPU backend runs on the CUDA backend instead, its kernels emulated.

``EMULATED_MODULE`` names the file of :func:`cuda_emulation.module_file`.
"""

from __future__ import annotations

import os
from pathlib import Path

import cuda_emulation
import torch

from peftkern.backends import registry

OPERATIONS = ("quantize", "dequantize")


def pytest_configure() -> None:
    file = Path(os.environ["EMULATED_MODULE"])
    cuda_emulation.use(file)
    cuda_emulation.set_options(file, order="random", seed=5)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    registry.operations()
    for operation in OPERATIONS:
        entries = registry._TABLE[operation]
        entries["cpu"] = entries["cuda"]
