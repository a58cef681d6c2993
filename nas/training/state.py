"""Where training stands, on disk: `state.json`, one file of tensors, and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from searchspace.errors import UserError
from searchspace.files import read_json, read_tensors, write_json, write_tensors
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

FIRST_STAGE, MAIN_STAGE = "largest", "supernet"
"""The two stages: the largest network alone, then all archs."""
STATE, LOG = "state.json", "log.jsonl"
START = "supernet.safetensors"
"""In the folder that `train.start` names: weights of a supernet that training begins with."""


@dataclass(frozen=True)
class TrainState:
    """Where training stands; with the tensors of `file` it is all that resuming needs.

    Args:
        step: steps done.
        budget_s: seconds of training in all, fixed when it began; None where steps are counted.
        elapsed_s: seconds spent on them, over all processes.
        precision: ``"fp32"`` or ``"bf16"``.
        done: whether training has ended.
        file: name of the tensors' file.
        stage: `FIRST_STAGE` or `MAIN_STAGE`.
        stage_start: steps that were done when the stage began.
        device: kind of device of the last steps, ``"cpu"`` or ``"cuda"``.
    """

    step: int = 0
    budget_s: float | None = None
    elapsed_s: float = 0.0
    precision: str = "fp32"
    done: bool = False
    file: str = ""
    stage: str = MAIN_STAGE
    stage_start: int = 0
    device: str = "cpu"


Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by part (`weights`, `optimizer`, `teacher`) and name."""


def read_state(folder: Path) -> TrainState | None:
    """Return where training in `folder` stands; None when it has not begun."""
    path = folder / STATE
    return TrainState(**read_json(path, "training state")) if path.exists() else None


def save_state(folder: Path, state: TrainState, parts: Tensors) -> TrainState:
    """Write the tensors, then the state that names them, then remove older tensors.

    A kill at any point leaves a state whose tensors are there. Files do not depend on the device.
    Returns the state as written.
    """
    file = "model.safetensors" if state.done else f"step-{state.step:07d}-{state.stage}.safetensors"
    tensors = {f"{part}/{k}": v.cpu() for part, named in parts.items() for k, v in named.items()}
    write_tensors(folder / file, tensors)
    state = replace(state, file=file)
    write_json(folder / STATE, asdict(state))
    for old in folder.glob("*.safetensors"):
        if old.name != file:
            old.unlink()
    return state


def read_parts(folder: Path, state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a state by part and name.

    Raises:
        UserError: when the file is absent or broken.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder / state.file).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def load_supernet(space: SearchSpace, folder: Path) -> Supernet:
    """Load a trained supernet.

    Raises:
        UserError: when training has not finished, or the files are not of this space.
    """
    state = read_state(folder)
    if state is None or not state.done:
        raise UserError(f"{folder} holds no trained supernet; run `nas train` first")
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    supernet.load_state_dict(read_parts(folder, state).get("weights", {}))
    return supernet


def truncate_log(folder: Path, step: int) -> None:
    """Drop the log's lines of steps that are not in the checkpoint and will be done again."""
    path = folder / LOG
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(kept), encoding="utf-8")
