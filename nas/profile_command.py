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
from hw_profiles.check import busy_here, check_table
from hw_profiles.comparison import compare
from hw_profiles.description import describe
from hw_profiles.device import Device
from hw_profiles.latency_table import LatencyTable
from hw_profiles.library import adopt, find, list_tables, require_of
from hw_profiles.locking import one_profiler
from hw_profiles.process import prepare_process, usable_processors
from hw_profiles.profiler import finished
from nas import _profile_text as text
from nas.config import ExperimentConfig
from nas.pipeline import Pipeline
from nas.progress import Reporter
from searchspace.errors import UserError

DEFAULT_RUN = "runs/quickstart"
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
    if options.foreign and not options.device:
        raise UserError(
            "--foreign belongs to --device: name the table of the other device with --device, see "
            "`nas profile list`"
        )
    source = find(options.device) if options.device else None
    values = {
        "profile__backend": options.backend,
        "profile__num_threads": options.threads,
        "profile__realtime": options.realtime or None,
    }
    if source and not options.foreign:
        if options.backend or options.threads:
            raise UserError(
                "--device says which backend and how many threads; leave --backend and --threads "
                "off, or add --foreign to use the table for another device"
            )
        values |= _set_up_as(source)
    config = config_of(**values)
    reporter = Reporter(options.quiet)
    pipeline = Pipeline(config, reporter)
    with one_profiler(pipeline.folder.table):
        if source and _adopted(pipeline, source, options.foreign).foreign:
            reporter.say(
                f"latency table: taken from {source}, of another device; latencies are predictions "
                "for that device, and none of them can be measured here"
            )
        else:
            _measure(pipeline, reporter)
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


def _adopted(pipeline: Pipeline, source: Path, foreign: bool) -> LatencyTable:
    """Copy a table into a run folder.

    Raises:
        UserError: when it is of another device and that was not asked for, or is but lacks what
            only that device could measure.
    """
    here = Device.current(get_backend(pipeline.config.profile.backend))
    table = LatencyTable.load(source)
    complete = finished(table, pipeline.space, pipeline.workloads)
    if foreign and table.device.difference(here) and not complete:
        raise UserError(
            f"the latency table {source} does not hold every sub-block of space "
            f"{pipeline.space.name!r} under {', '.join(item.name for item in pipeline.workloads)}, "
            "and what is missing cannot be measured here; see `nas profile show` for its spaces "
            "and workloads"
        )
    return adopt(source, pipeline.folder.table, here, foreign=foreign)


def _measure(pipeline: Pipeline, reporter: Reporter) -> None:
    path = pipeline.folder.table
    known = path.exists() and finished(LatencyTable.load(path), pipeline.space, pipeline.workloads)
    if not known:
        _say_busy(get_backend(pipeline.config.profile.backend), reporter)
    pipeline.profile()


def _say_busy(backend: Backend, reporter: Reporter) -> str:
    """Warn where other programs use the processors; returns the warning or an empty text."""
    sentence = busy_here(backend)
    if sentence:
        reporter.say(f"warning: {sentence}")
    return sentence


def _print(as_json: bool, facts: Any, lines: Callable[[], list[str]]) -> None:
    print(json.dumps(facts) if as_json else "\n".join(lines()))
