"""What a run folder holds, read once and checked, for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from nas.report.networks import Network, mapping, networks_of, numbers
from searchspace.errors import UserError
from searchspace.files import read_json

GROUPS = ("front", "random", "uniform")
NO_CURVES = ("step", "elapsed_s")
"""What a line of the training log holds besides the loss of each role."""


@dataclass(frozen=True)
class RunData:
    """Everything the report shows. Parts that the folder does not hold are empty.

    Args:
        folder: the run folder, as it was given.
        config: `config.json`.
        front: `front.json` without the networks.
        groups: the measured networks by group.
        search: `search.json`.
        training: lines of the training log, one per step.
        exports: `export.json` by arch id.
    """

    folder: Path
    config: Mapping[str, Any]
    front: Mapping[str, Any]
    groups: Mapping[str, tuple[Network, ...]]
    search: Mapping[str, Any]
    training: tuple[Mapping[str, float], ...]
    exports: Mapping[str, Mapping[str, Any]]

    @property
    def unit(self) -> str:
        """What a loss is per: ``"byte"``, ``"token"`` or ``"example"``."""
        return str(self.front.get("unit", "byte"))

    @property
    def has_accuracy(self) -> bool:
        """Whether networks of this task are judged by their accuracy too."""
        return any(network.accuracy is not None for network in self.networks)

    @property
    def energy_workloads(self) -> list[str]:
        """The workloads whose energy was measured."""
        return [w for w in self.workloads if any(w in n.energy_mj for n in self.networks)]

    @property
    def target(self) -> str:
        """What one training loss is of: a token of text too, whose test loss is per byte."""
        return {"byte": "token", "token": "token", "example": "example"}.get(
            str(self.front.get("unit")), "target"
        )

    @property
    def roles(self) -> list[str]:
        """The roles in training whose losses were logged, in the order in which they are shown."""
        found = dict.fromkeys(key for row in self.training for key in row if key not in NO_CURVES)
        return sorted(found, key=_role_order)

    @property
    def first_stage_end(self) -> int | None:
        """The last step in which only the largest network was trained; None for one stage."""
        alone = list(takewhile(_only_largest, self.training))
        return int(alone[-1]["step"]) if 0 < len(alone) < len(self.training) else None

    @property
    def workloads(self) -> list[str]:
        """The workloads that were timed, the searched one first."""
        names = [str(name) for name in self.front.get("workloads", ())]
        main = self.front.get("workload")
        return sorted(names, key=lambda name: name != main)

    @property
    def networks(self) -> list[Network]:
        """All measured networks of all groups, the front last (it is drawn on top)."""
        return [network for group in reversed(GROUPS) for network in self.groups[group]]

    @property
    def front_by_latency(self) -> list[Network]:
        """The front, fastest first on the searched workload."""
        main = self.workloads[0] if self.workloads else ""
        return sorted(self.groups["front"], key=lambda n: n.latency_ms.get(main, math.inf))

    @property
    def tags(self) -> dict[str, list[str]]:
        """The names under which a network was chosen (``best``, ``knee``, …), by arch id."""
        tags: dict[str, list[str]] = {}
        for name, arch_id in mapping(self.front.get("chosen")).items():
            tags.setdefault(str(arch_id), []).append(str(name))
        return tags


def _only_largest(row: Mapping[str, float]) -> bool:
    return "largest" in row and not set(row) - {"largest", *NO_CURVES}


def _role_order(role: str) -> tuple[int, float]:
    """Put the largest first, then FFN widths from wide to narrow, then the others."""
    width = role.removeprefix("ffn_")
    if role != width and width.isdecimal():
        return 1, -float(width)
    return {"largest": 0, "random": 2, "smallest": 3}.get(role, 4), 0.0


def load_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: when there is no run in it, or a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}; run `nas run --out {folder}` first")
    front = _read(folder / "front.json", "front")
    config = _read(folder / "config.json", "config")
    search = _read(folder / "search.json", "search archive")
    training = _read_log(folder / "supernet" / "log.jsonl")
    if not (front or config or search or training):
        raise UserError(
            f"{folder} holds no run: neither front.json, search.json, config.json nor a training "
            f"log is there; run `nas run --out {folder}` first"
        )
    exports = {
        path.parent.name: _read(path, "export record")
        for path in sorted(folder.glob("subnets/*/export.json"))
        if not path.parent.name.startswith(".")
    }
    return from_parts(front, folder, config, search, training, exports)


def from_parts(
    front: Mapping[str, Any],
    folder: Path = Path(),
    config: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    training: tuple[Mapping[str, float], ...] = (),
    exports: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunData:
    """Return the data of a front (the content of `front.json`) and what goes with it."""
    front = _writable(front)
    groups = mapping(front.get("groups"))
    return RunData(
        folder=folder,
        config=config or {},
        front={key: value for key, value in front.items() if key != "groups"},
        groups={name: networks_of(groups.get(name), name) for name in GROUPS},
        search=search or {},
        training=training,
        exports=exports or {},
    )


def _read(path: Path, what: str) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path, what)
    if not isinstance(value, Mapping):
        raise UserError(f"{path} is not a {what}: it holds no JSON object; write it again")
    return _writable(value)


def _writable(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace halves of surrogate pairs, which JSON may hold but no font and no file can."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return dict(json.loads(text))


def _read_log(path: Path) -> tuple[Mapping[str, float], ...]:
    """Read the log; a line cut off by a kill is left out, of a step done twice the last counts."""
    if not path.exists():
        return ()
    by_step: dict[float, Mapping[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = numbers(json.loads(line))
        except json.JSONDecodeError:
            continue
        if "step" in entry:
            by_step[entry["step"]] = entry
    return tuple(by_step[step] for step in sorted(by_step))
