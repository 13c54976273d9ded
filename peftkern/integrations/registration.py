"""Enters :class:`QuantConfig` in transformers' table of quantization methods, without importing transformers.

A saved model is loaded by ``import peftkern`` and a plain ``from_pretrained(folder)``, in either order of the two
imports, so the entry has to be there by the time that transformers reads a ``config.json``. Its table lives in
``transformers.quantizers.auto``. Where that module is loaded already we register at once; otherwise an import hook
waits for this one module, registers when it has been executed, and removes itself. Nothing but the two documented
registration functions of transformers is called, and entries of other methods stay as they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "peftkern"
"""``quant_method`` in a ``config.json``."""

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Register the configuration and its quantizer with transformers, which this imports. Repeating it does nothing."""
    _enter(importlib.import_module(_REGISTRY))


def register_on_import() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are. Repeating it does nothing."""
    if _REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _enter(registry: Any) -> None:
    from peftkern.integrations.quant_config import QuantConfig
    from peftkern.integrations.quantizer import PeftkernQuantizer

    if METHOD not in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        registry.register_quantization_config(METHOD)(QuantConfig)
    if METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantizer(METHOD)(PeftkernQuantizer)


class _RegistryFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads the module as its own loader does, then registers and takes the hook away."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _enter(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegistryFinder)]
