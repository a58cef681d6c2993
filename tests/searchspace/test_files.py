"""Files appear whole or not at all, and killed processes leave nothing behind for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from searchspace.errors import UserError
from searchspace.files import (
    read_json,
    read_tensors,
    remove_leftovers,
    temporary_name,
    write_file,
    write_json,
    write_tensors,
)


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail(stream: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; choose another folder"):
        write_file(path, fail)
    assert read_json(path, "value") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_tensors_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "weights.safetensors"
    value = torch.arange(12.0).reshape(3, 4)
    write_tensors(path, {"w": value})
    assert torch.equal(read_tensors(path)["w"], value)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_tensors(path)
    with pytest.raises(UserError, match="there is no weights file"):
        read_tensors(tmp_path / "absent")


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = temporary_name(tmp_path / "sub" / "x.json")
    others = tmp_path / "sub" / mine.name.replace(str(os.getpid()), str(dead.pid))
    folder = tmp_path / f".net.{dead.pid}.tmp"
    folder.mkdir()
    for path in (mine, others, folder / "config.json", tmp_path / "notes.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    remove_leftovers(tmp_path)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["notes.tmp", f"sub/{mine.name}"]
