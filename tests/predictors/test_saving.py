"""Predictor files: what is written is read again, and nothing else is."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predictors.models.saving import read_model, write_model
from searchspace.errors import UserError

STATE: dict[str, Any] = {
    "number": 1.5,
    "none": None,
    "names": ["a", "b"],
    "nested": {"list": [{"array": np.arange(6.0).reshape(2, 3)}, 3]},
    "ints": np.array([1, -2]),
    "empty": np.zeros((0, 4)),
    "flags": np.array([True, False]),
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.safetensors"
    write_model(path, "latency", STATE)
    state = read_model(path, "latency")
    assert [state[key] for key in ("number", "none", "names")] == [1.5, None, ["a", "b"]]
    np.testing.assert_array_equal(
        state["nested"]["list"][0]["array"], STATE["nested"]["list"][0]["array"]
    )
    assert state["nested"]["list"][1] == 3
    for name in ("ints", "empty", "flags"):
        np.testing.assert_array_equal(state[name], STATE[name])
        assert state[name].dtype == STATE[name].dtype
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_numpy_scalars_and_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_model(path, "latency", {"x": np.float64(0.1), "n": np.int64(3)})
    assert read_model(path, "latency") == {"x": 0.1, "n": 3}


def test_other_kind_and_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_model(path, "latency", STATE)
    with pytest.raises(UserError, match="holds a latency predictor, not a quality predictor"):
        read_model(path, "quality")
    content = path.read_bytes().replace(b'"version":"1"', b'"version":"9"')
    path.write_bytes(content)
    with pytest.raises(UserError, match="format version 9"):
        read_model(path, "latency")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "model"
    with pytest.raises(UserError, match="there is no predictor file"):
        read_model(path, "latency")
    write_model(path, "latency", STATE)
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a whole predictor file"):
            read_model(path, "latency")
    path.write_bytes(pickle.dumps(STATE))
    with pytest.raises(UserError, match="not a whole predictor file"):
        read_model(path, "latency")
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(UserError, match="holds no predictor of this package"):
        read_model(path, "latency")
    with pytest.raises(UserError, match=r"cannot read|not a whole"):
        read_model(tmp_path, "latency")


def test_an_array_that_is_missing_is_noticed(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "model"
    write_model(path, "latency", STATE)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file({"other": np.zeros(1)}, path, metadata)
    with pytest.raises(UserError, match="damaged"):
        read_model(path, "latency")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_model(tmp_path / "file" / "model", "latency", STATE)
