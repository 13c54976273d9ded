"""Classes that are known by what they compute: the `forward` of their class is that of a class in a table.

A class that somebody else has given another `forward`, or another class put in its place, is not one of the table.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

Row = TypeVar("Row")

_PACKAGE = "transformers.models."


def known_row(layer_class: type, rows: Mapping[str, Row]) -> Row | None:
    """The row of the class whose forward ``layer_class`` runs.

    Args:
        layer_class: a class of modules.
        rows: by module and class, for example ``"llama.modeling_llama.LlamaRMSNorm"``; the module is one of
            `transformers.models`, or stands there in full.
    """
    forward: Any = getattr(layer_class, "forward", None)
    module_name = getattr(forward, "__module__", None) or ""
    # by name as well: a function that replaces the forward in its class is not the one known here
    class_name, _, function = getattr(forward, "__qualname__", "").rpartition(".")
    row = rows.get(f"{module_name.removeprefix(_PACKAGE)}.{class_name}") if function == "forward" else None
    known = getattr(sys.modules.get(module_name), class_name, None)
    return row if getattr(known, "forward", None) is forward else None
