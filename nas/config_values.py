"""Config dataclasses from nested mappings, and values from text."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from searchspace.errors import UserError, unknown


def parse_value(text: str) -> Any:
    """Return a value in TOML syntax; bare words are strings."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted path in nested mappings.

    Raises:
        UserError: when the path leads through a value.
    """
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{key!r} goes into {parent!r}, which is a value and not a section")
    values[last] = value


def build_config(cls: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a config dataclass, whose fields may be such dataclasses, from nested mappings.

    Raises:
        UserError: for an unknown key or a value of the wrong type, naming it with its `prefix`.
    """
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise unknown("config key", prefix + name, [prefix + key for key in known])
        kind = _section_of(hints[name])
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{name} is a section, not the value {value!r}")
            arguments[name] = build_config(typing.cast(type[Any], kind), value, f"{prefix}{name}.")
        else:
            arguments[name] = _convert(value, kind, prefix + name)
    return cls(**arguments)


def _section_of(kind: Any) -> Any:
    """Return the dataclass of a section that may be left out, and anything else as it is."""
    found = [option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)]
    return found[0] if found else kind


def _convert(value: Any, kind: Any, name: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is str and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple | str):
            return (value,) if isinstance(value, str) else tuple(value)
        if typing.get_origin(option) is Mapping and isinstance(value, Mapping):
            return dict(value)
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
    if typing.get_origin(kind) is typing.Literal:
        raise unknown(name, value, map(str, typing.get_args(kind)))
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise UserError(f"{name}={value!r} has the wrong type; it takes {wanted}")
