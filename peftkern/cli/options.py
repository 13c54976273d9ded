"""Command line options made from the fields of a settings dataclass, so that each setting is written down once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from peftkern.finetune.config import FinetuneConfig, field_types, option_name


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` an option for every setting; it gets them as one mapping ``settings``.

    Those that were not given are ``None`` in it, so that a file or a default can decide. Other parameters of the
    command stay options of their own.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    generated = [_parameter(field) for field in dataclasses.fields(FinetuneConfig)]
    names = [parameter.name for parameter in generated]

    def wrapper(**arguments: Any) -> None:
        settings: Mapping[str, Any] = {name: arguments.pop(name) for name in names}
        command(settings=settings, **arguments)

    parameters = [*generated, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    return wrapper


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    value_type, _ = field_types()[field.name]
    annotation = Annotated[value_type | None, _declare(field, value_type)]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _declare(field: dataclasses.Field[Any], value_type: type) -> Any:
    group, choices = field.metadata["group"], field.metadata["choices"]
    text = escape(_help(field.metadata["help"], choices, field.default))
    if field.name == "model":
        return typer.Argument(metavar="MODEL", help=text, show_default=False)
    name = option_name(field.name)
    if value_type is bool and field.default:
        name = f"{name}/--no-{name.removeprefix('--')}"
    return typer.Option(name, help=text, rich_help_panel=group, show_default=False)


def _help(text: str, choices: Sequence[str], default: Any) -> str:
    if choices:
        text = f"{text} One of {', '.join(choices)}."
    # without a default there is nothing to show; that a switch is off needs no saying
    if default is dataclasses.MISSING or default is None or default is False:
        return text
    shown = "on" if default is True else f"{default:g}" if isinstance(default, float) else default
    return f"{text} [default: {shown}]"
