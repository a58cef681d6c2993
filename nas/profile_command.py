"""`nas profile` and its list, show, diff and check: what the command line calls."""

from __future__ import annotations

import contextlib
import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hw_profiles.backends import Backend, get_backend
from hw_profiles.device import Device
from hw_profiles.latency_table import LatencyTable
from hw_profiles.latency_table.locking import one_profiler
from hw_profiles.library import adopt, find, list_tables, require_of
from hw_profiles.library.check import busy_here, check_table
from hw_profiles.library.comparison import compare
from hw_profiles.library.description import describe
from hw_profiles.process import prepare_process, usable_processors
from hw_profiles.transfer import transfer
from nas import _profile_text as text
from nas.config import ExperimentConfig
from nas.pipeline import Pipeline
from nas.progress import Reporter
from searchspace.errors import UserError

DEFAULT_RUN = "runs/quickstart"
DEFAULT_MEASUREMENTS = 20
EXIT_HOLDS, EXIT_DOES_NOT_HOLD = 0, 1


def list_command(options: Namespace) -> int:
    """Print the shipped tables and those of the run folders here."""
    rows = [listed.summary() for listed in list_tables()]
    _print(options.json, rows, lambda: text.list_lines(rows))
    return 0


def show_command(options: Namespace) -> int:
    """Print what a table says about itself.

    Raises:
        UserError: when there is no such table or it cannot be used.
    """
    path = find(options.table)
    facts = {"path": str(path), **describe(LatencyTable.load(path))}
    _print(options.json, facts, lambda: text.show_lines(facts))
    return 0


def diff_command(options: Namespace) -> int:
    """Print what differs between two tables.

    Raises:
        UserError: when one cannot be used, or they have nothing in common.
    """
    first, second = find(options.first), find(options.second)
    found = asdict(compare(LatencyTable.load(first), LatencyTable.load(second)))
    facts = {"first": str(first), "second": str(second), **found}
    _print(options.json, facts, lambda: text.diff_lines(facts))
    return 0


def check_command(options: Namespace) -> int:
    """Time a sample of a table again and print whether it still holds.

    Returns:
        0 when it does, 1 when it does not or cannot be told.

    Raises:
        UserError: when the table cannot be used or is of another device.
    """
    path = find(options.table or DEFAULT_RUN)
    table = LatencyTable.load(path)
    reporter = Reporter(options.quiet)
    threads = table.device.num_threads
    prepare_process(threads if threads <= usable_processors() else None)
    backend = get_backend(table.device.backend)
    table.device.require_same(Device.current(backend), f"the latency table {path}")
    # Installed packages cannot be written to, and nobody measures their tables.
    alone = one_profiler(path) if os.access(path.parent, os.W_OK) else contextlib.nullcontext()
    with alone:
        busy = _say_busy(backend, reporter)
        with reporter.bar("check") as bar:
            result = check_table(table, realtime=options.realtime, progress=bar.update)
    facts = {"path": str(path), "busy": busy, **result.to_dict()}
    _print(options.json, facts, lambda: text.check_lines(facts))
    return EXIT_HOLDS if result.holds else EXIT_DOES_NOT_HOLD


def stage_command(options: Namespace, config_of: Callable[..., ExperimentConfig]) -> Path:
    """Measure this device's table for a run folder, or take one that is there already.

    Args:
        options: of ``nas profile``.
        config_of: returns the resolved config, given further values by dotted path (``__`` for the
            dot).

    Returns:
        The run folder.

    Raises:
        UserError: when config, folder and tables do not go together, or another profiler is at it.
    """
    if options.device and options.source:
        raise UserError(
            "--device takes a table as it is, --from transfers one of another device: give one of "
            "the two"
        )
    if options.measurements is not None and not options.source:
        raise UserError("--measurements belongs to --from: name the table to transfer with --from")
    ready = find(options.device) if options.device else None
    source = LatencyTable.load(find(options.source)) if options.source else None
    values = {
        "profile__backend": options.backend,
        "profile__num_threads": options.threads,
        "profile__realtime": options.realtime or None,
    }
    if ready:
        if options.backend or options.threads:
            raise UserError(
                "--device says which backend and how many threads; leave --backend and --threads "
                "off, or transfer the table with --from"
            )
        values |= _set_up_as(ready)
    config = config_of(**values)
    reporter = Reporter(options.quiet)
    pipeline = Pipeline(config, reporter)
    with one_profiler(pipeline.folder.table):
        if source:
            _transfer(pipeline, source, options.measurements or DEFAULT_MEASUREMENTS, reporter)
        else:
            if ready:
                here = Device.current(get_backend(config.profile.backend))
                adopt(ready, pipeline.folder.table, here)
            pipeline.profile()
    return pipeline.folder.path


def _set_up_as(source: Path) -> dict[str, Any]:
    """Set this process up as it was for a table; returns the values of the config for that.

    Raises:
        UserError: when this is another device, before anything is written.
    """
    table = LatencyTable.load(source)
    threads = table.device.num_threads
    prepare_process(min(threads, usable_processors()))
    backend = get_backend(table.device.backend)
    require_of(table, source, Device.current(backend))
    values: dict[str, Any] = {"profile__backend": backend.name}
    if threads != usable_processors():
        values["profile__num_threads"] = threads
    return values


def _transfer(
    pipeline: Pipeline, source: LatencyTable, num_measurements: int, reporter: Reporter
) -> None:
    """Make the run folder's table from another device's and a few whole networks timed here."""
    profile = pipeline.config.profile
    _say_busy(get_backend(profile.backend), reporter)
    with reporter.bar("transfer") as bar:
        table = transfer(
            source,
            pipeline.space,
            pipeline.workloads,
            pipeline.folder.table,
            num_measurements=num_measurements,
            backend=profile.backend,
            num_threads=profile.num_threads,
            seed=pipeline.config.seed,
            realtime=profile.realtime,
            progress=bar.update,
        )
    for workload in table.workloads:
        fit = table.correction(workload)
        reporter.say(
            f"latency table: {workload.name} predicted within {fit.mape:.1f}% (left-out error on "
            f"{fit.num_networks} whole networks); `nas profile` measures the rest"
        )


def _say_busy(backend: Backend, reporter: Reporter) -> str:
    """Warn where other programs use the processors; returns the warning or an empty text."""
    sentence = busy_here(backend)
    if sentence:
        reporter.say(f"warning: {sentence}")
    return sentence


def _print(as_json: bool, facts: Any, lines: Callable[[], list[str]]) -> None:
    print(json.dumps(facts) if as_json else "\n".join(lines()))
