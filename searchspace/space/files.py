"""Search spaces as TOML files and JSON-ready mappings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchspace.errors import UserError, unknown
from searchspace.family import Family
from searchspace.files import read_toml

if TYPE_CHECKING:
    from searchspace.space import SearchSpace
    from searchspace.space.halves import Operators as OptionChoices

PRESETS = Path(__file__).parents[1] / "presets"
TOP_KEYS = ("name", "d_model", "head_dim", "num_layers", "min_depth", "layers", "family")
PLAIN_LAYER_KEYS = (
    "position",
    "mixer_precision",
    "kv_shared",
    "ffn",
    "intermediate_size",
    "ffn_precision",
    "norm",
    "norm_placement",
)


def space_to_dict(space: SearchSpace) -> dict[str, Any]:
    """Return the JSON-ready form of a space, which `space_arguments` reads."""
    ffns = {name: space.ffn_options.get(name, {}) for name in space.ffn}
    return {
        "name": space.name,
        "d_model": list(space.d_model),
        "head_dim": space.head_dim,
        "num_layers": space.num_layers,
        "min_depth": space.min_depth,
        "family": space.family.to_dict(),
        "layers": {
            "mixer": _as_tables(space.mixers),
            "heads": [list(pair) for pair in space.heads],
            **{key: list(getattr(space, key)) for key in PLAIN_LAYER_KEYS},
            "ffn": _as_tables(ffns) if space.ffn_options else list(space.ffn),
        },
    }


def space_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SearchSpace` but for the vocabulary.

    Args:
        values: the form a preset's TOML file has.

    Raises:
        UserError: for a missing or unknown key, with the nearest known one, or a value of a wrong
            form.
    """
    for key in values:
        if key not in TOP_KEYS:
            raise unknown("key of a search space", key, TOP_KEYS)
    for key in ("d_model", "head_dim", "num_layers", "layers"):
        if key not in values:
            raise UserError(f"the search space lacks {key!r}; it has {', '.join(TOP_KEYS)}")
    if not isinstance(values["layers"], Mapping):
        raise UserError(f"[layers] must be a table, not {values['layers']!r:.40}")
    return {
        "name": values.get("name", "custom"),
        "d_model": _choices("d_model", values["d_model"]),
        "head_dim": values["head_dim"],
        "num_layers": values["num_layers"],
        "min_depth": values.get("min_depth", 1),
        "family": dict(values.get("family", {})),
        **_layer_arguments(values["layers"]),
    }


def family_of(values: Mapping[str, Any], facts: Mapping[str, Any], name: str) -> Family:
    """Return the family that a space's file and a task's facts describe together.

    Raises:
        UserError: when they contradict each other, or the result is not valid.
    """
    kind, wanted = values.get("kind", "decoder"), facts.get("kind", "decoder")
    if facts and kind != wanted:
        raise UserError(
            f"the task needs a {wanted}, but space {name!r} is of family kind={kind!r}; choose a "
            f"preset of that kind, such as {wanted}-small"
        )
    merged = {**values, **facts}
    if kind != "decoder" and not facts and "num_classes" not in merged:
        # Read without a task, to look at it or to check it.
        merged = {"num_classes": 2, **merged}
        if kind == "vit":
            merged = {"image_size": merged.get("patch_size", 1) * 4, "channels": 1, **merged}
    return Family.from_dict(merged)


def _layer_arguments(layers: Mapping[str, Any]) -> dict[str, Any]:
    known = ("mixer", "heads", *PLAIN_LAYER_KEYS)
    for key in layers:
        if key not in known:
            raise unknown("key of [layers]", key, known)
    for key in ("mixer", "heads", "intermediate_size"):
        if key not in layers:
            raise UserError(f"the search space lacks [layers] {key!r}")
    if isinstance(layers.get("ffn"), Mapping):
        ffns = _tables("ffn", layers["ffn"])
        options = {name: choices for name, choices in ffns.items() if choices}
        layers = {**layers, "ffn": list(ffns)}
    else:
        options = {}
    return {
        "mixers": _tables("mixer", layers["mixer"]),
        "heads": tuple(_pair(pair, layers["heads"]) for pair in _choices("heads", layers["heads"])),
        **{key: _choices(key, layers[key]) for key in PLAIN_LAYER_KEYS if key in layers},
        "ffn_options": options,
    }


def _tables(kind: str, tables: object) -> OptionChoices:
    """Return the choices of every operator's options."""
    if not isinstance(tables, Mapping) or not all(isinstance(o, Mapping) for o in tables.values()):
        raise UserError(f"[layers] {kind} must be a table with one table per {kind}")
    return {
        name: {option: _choices(f"{name}.{option}", given) for option, given in options.items()}
        for name, options in tables.items()
    }


def _as_tables(operators: OptionChoices) -> dict[str, dict[str, list[Any]]]:
    """Return the JSON-ready form of what `_tables` reads."""
    return {name: {k: list(v) for k, v in o.items()} for name, o in operators.items()}


def _choices(key: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{key}={value!r} must be a list of choices, such as [{value!r}]")
    return tuple(value)


def _pair(pair: object, heads: object) -> tuple[int, int]:
    if (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
    ):
        return pair[0], pair[1]
    raise UserError(
        f"heads={heads} must be a list of pairs [query heads, key/value heads], such as [[6, 2]]"
    )


def read_space(preset: str) -> dict[str, Any]:
    """Read a shipped preset by name, or a TOML file by path; named after the file by default.

    Raises:
        UserError: when there is no such preset or file, or it is not TOML.
    """
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not path.is_file():
        if preset.endswith(".toml"):
            raise UserError(f"no search space file {preset!r}; give a preset name or a path")
        raise unknown("preset", preset, (p.stem for p in PRESETS.glob("*.toml")))
    return {"name": path.stem, **read_toml(path, "search space file")}
