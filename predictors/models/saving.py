"""Fitted models as files: arrays and JSON in one safetensors file, nothing that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from predictors.models.base import State
from searchspace.errors import UserError
from searchspace.files import write_file

FORMAT = "hwnas-predictor"
VERSION = 1
_ARRAY = "__array__"


def write_model(path: Path | str, kind: str, state: State) -> None:
    """Write a fitted model under a temporary name, then rename it into place.

    Args:
        path: the file; its folder is made if need be.
        kind: what the model is, such as ``"latency"``; `read_model` asks for the same.
        state: dictionaries, lists, JSON values and numpy arrays, nested as need be.

    Raises:
        UserError: when the file cannot be written.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    plain = _without_arrays(state, "state", arrays)
    # A metadata-only file is not allowed by the format, hence the empty array.
    tensors = arrays or {"empty": np.zeros(0)}
    metadata = {"format": FORMAT, "version": str(VERSION), "kind": kind, "state": json.dumps(plain)}
    content = save(tensors, metadata)
    write_file(Path(path), lambda stream: stream.write(content))


def read_model(path: Path | str, kind: str) -> dict[str, Any]:
    """Read the state that `write_model` wrote.

    Raises:
        UserError: when the file is absent, truncated, foreign, or of another kind or version.
    """
    metadata, arrays = _read(Path(path))
    if metadata.get("format") != FORMAT or "state" not in metadata:
        raise UserError(f"{path} holds no predictor of this package; give a file that save() wrote")
    if metadata.get("kind") != kind:
        raise UserError(f"{path} holds a {metadata.get('kind')} predictor, not a {kind} predictor")
    if metadata.get("version") != str(VERSION):
        raise UserError(
            f"{path} has format version {metadata.get('version')}, this release reads {VERSION}; "
            "fit and save it again"
        )
    try:
        state = _with_arrays(json.loads(metadata["state"]), arrays)
    except (json.JSONDecodeError, KeyError):
        raise UserError(f"{path} is damaged: its parts do not fit; save it again") from None
    return dict(state)


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            # Copies, because what is read are views into the file: sums may depend on alignment.
            arrays = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), arrays
    except FileNotFoundError:
        raise UserError(f"there is no predictor file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole predictor file ({error}); save it again") from None


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, np.ndarray):
        arrays[name] = np.ascontiguousarray(value)
        return {_ARRAY: name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _without_arrays(part, f"{name}.{key}", arrays) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(part, f"{name}.{i}", arrays) for i, part in enumerate(value)]
    return value


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _with_arrays(part, arrays) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_arrays(part, arrays) for part in value]
    return value
