"""Where latency tables lie, and what they say: shipped ones, those in run folders, any file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw_profiles.device import Device
from hw_profiles.latency_table import MEASURED, LatencyTable
from searchspace.errors import UserError, unknown

TABLES = Path(__file__).parent.parent / "tables"
RUNS = Path("runs")
IN_RUN = "latency_table.json"
SUFFIXES = (".json", ".json.gz")
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
MAX_DISTURBED_SHARE = 0.05
"""Of a shipped table's entries."""
MAX_ERROR_PCT = 10.0
"""Of whole networks, predicted by a shipped table."""


@dataclass(frozen=True)
class Listed:
    """One line of a list of tables.

    Args:
        name: of a shipped table, or the path of a run folder.
        path: the table's file.
        shipped: whether it came with the package.
        table: None when the file cannot be used.
        problem: why, in that case.
    """

    name: str
    path: Path
    shipped: bool
    table: LatencyTable | None
    problem: str = ""

    def summary(self) -> dict[str, Any]:
        """Return what a list shows, JSON-ready."""
        values: dict[str, Any] = {
            "name": self.name,
            "path": str(self.path),
            "shipped": self.shipped,
            "problem": self.problem,
        }
        if self.table is None:
            return values
        return values | {
            "device": self.table.device.accelerator or self.table.device.cpu,
            "device_id": self.table.device.id,
            "backend": self.table.device.backend,
            "num_threads": self.table.device.num_threads,
            "spaces": [space.name for space in self.table.spaces],
            "num_entries": len(self.table.entries),
            "measured_at": self.table.measured_at,
        }


def shipped_tables(folder: Path | None = None) -> dict[str, Path]:
    """Return the shipped tables' files by name."""
    found = {}
    for path in sorted((folder or TABLES).glob("*.json*")):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
        if suffix and not path.name.startswith("."):
            found[path.name.removesuffix(suffix)] = path
    return found


def list_tables(runs: Path | None = None) -> list[Listed]:
    """Return all shipped tables and those of the run folders in `runs` (default: ``runs``)."""
    in_runs = {str(path.parent): path for path in sorted((runs or RUNS).glob(f"*/{IN_RUN}"))}
    return [
        *(_listed(name, path, True) for name, path in shipped_tables().items()),
        *(_listed(name, path, False) for name, path in in_runs.items()),
    ]


def _listed(name: str, path: Path, shipped: bool) -> Listed:
    try:
        return Listed(name, path, shipped, LatencyTable.load(path))
    except UserError as error:
        return Listed(name, path, shipped, None, str(error))


def find(name_or_path: str | Path) -> Path:
    """Return a table's file.

    Args:
        name_or_path: a table's file, a run folder, the name of a run in ``runs``, or a shipped
            table's name or device id.

    Raises:
        UserError: when there is no such table, or several shipped ones are of that device.
    """
    path = Path(name_or_path)
    for candidate in (path / IN_RUN, RUNS / path / IN_RUN):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"{path} holds no latency table; run `nas profile` for it first")
    if path.is_file():
        return path
    if path.name.endswith(SUFFIXES) or len(path.parts) > 1:
        raise UserError(f"there is no latency table at {path}; `nas profile list` names all")
    return find_shipped(str(name_or_path))


def find_shipped(name: str) -> Path:
    """Return the file of a shipped table, by name or device id.

    Raises:
        UserError: when there is none, or several are of that device.
    """
    tables = shipped_tables()
    if name in tables:
        return tables[name]
    of_device = {
        other: path
        for other, path in tables.items()
        if (table := _listed(other, path, True).table) is not None and table.device.id == name
    }
    if len(of_device) > 1:
        raise UserError(
            f"several shipped latency tables are of device {name}: choose {' or '.join(of_device)}"
        )
    if of_device:
        return next(iter(of_device.values()))
    if not tables:
        raise UserError(
            f"no latency table is called {name!r}: none is shipped with this version; run "
            "`nas profile` to measure one"
        )
    raise unknown("latency table", name, tables)


def adopt(source: Path, path: Path, here: Device) -> LatencyTable:
    """Copy a table to `path` and use it there instead of measuring.

    Args:
        source: the table's file.
        path: where it is needed, such as ``latency_table.json`` of a run folder; if it is there
            already, nothing is written.
        here: the device that networks are run on.

    Raises:
        UserError: when it is of another device, or `path` holds a table of another one.
    """
    table = LatencyTable.load(source)
    require_of(table, source, here)
    if path.exists():
        present = LatencyTable.load(path)
        if present.device.id != table.device.id:
            raise UserError(
                f"{path} is already there and of device {present.device.id}, not "
                f"{table.device.id}; give another --out"
            )
        return present
    table.save(path)
    return table


def require_of(table: LatencyTable, source: Path, here: Device) -> None:
    """Check that a table is of this device.

    Raises:
        UserError: saying what differs, and what can be done.
    """
    if differences := table.device.difference(here):
        raise UserError(
            f"the latency table {source} is of device {table.device.id} but this is {here.id} "
            f"({'; '.join(differences)}); leave --device off to measure this device, or transfer "
            "the table with --from and a few measurements"
        )


def ship(source: str | Path, name: str, folder: Path | None = None) -> Path:
    """Pack a table as one that the package ships.

    Args:
        source: as for `find`.
        name: lower-case letters, digits and ``-``.
        folder: where to; the package's own by default.

    Returns:
        The new file.

    Raises:
        UserError: when the name is not allowed, or the table is of no known space, holds
            what was not measured here or was disturbed, or predicts badly.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"table name {name!r}: use lower-case letters and digits, joined by '-'")
    table = LatencyTable.load(find(source))
    if faults := list(_faults(table)):
        raise UserError(f"{source} cannot be shipped: {'; '.join(faults)}; profile it again")
    path = (folder or TABLES) / f"{name}.json.gz"
    table.save(path, keep_others=False)
    return path


def _faults(table: LatencyTable) -> Iterator[str]:
    if not table.spaces:
        yield "it does not say for which search space it is"
    entries = list(table.entries.values())
    if others := sum(entry.source != MEASURED for entry in entries):
        yield f"{others} entries were not measured"
    disturbed = sum(entry.source == MEASURED and not entry.reliable for entry in entries)
    if disturbed > MAX_DISTURBED_SHARE * len(entries):
        yield f"{disturbed} of {len(entries)} entries were disturbed"
    for workload in table.workloads:
        mape = table.correction(workload).mape
        if not mape <= MAX_ERROR_PCT:
            yield f"{workload.name} is predicted with an error of {mape:.1f} %"
