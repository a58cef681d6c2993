"""One run folder of two, whose searches evaluated archs of the same space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hw_profiles.latency_table import LatencyTable
from nas.candidates import Objectives, Prices, metrics_of
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import adopt, evaluations, open_study, space_key, sqlite_url, studies_at, weights_key
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import read_json, temporary_name, write_json

PARTS = ("task", "supernet", "latency_table.json", "metric_scores.json")


def merge_runs(first: Path, second: Path, out: Path, mixed_weights: bool = False) -> dict[str, Any]:
    """Make a run folder with everything that two runs have evaluated, each arch once.

    Config, weights and latency table are those of the first run, and its table prices the archs
    of the second one, so runs of different devices can be merged: losses do not depend on them.

    Args:
        first: a run folder.
        second: another one.
        out: the new run folder; must not exist or be empty.
        mixed_weights: accept losses of different supernets.

    Returns:
        ``folder``, and the numbers of archs ``from_first``, ``from_second`` and ``in_both``.

    Raises:
        UserError: when the runs differ in space, objectives, task or weights, when one holds no
            study, or `out` is not empty.
    """
    runs = [_open(folder) for folder in (first, second)]
    _check_same(first, second, runs[0], runs[1], mixed_weights)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and not empty; give another --out")
    temporary = temporary_name(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        counts = _write(runs[0], runs[1], temporary, out)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"folder": str(out), **counts}


def _open(folder: Path) -> Pipeline:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.json")
    config = load_config(str(folder / "config.json"), out=str(folder))
    if not config.search.storage and not (folder / "study.db").is_file():
        raise UserError(f"{folder} holds no study; run `nas search` there first")
    return Pipeline(config, Reporter(quiet=True))


def _check_same(first: Path, second: Path, a: Pipeline, b: Pipeline, mixed_weights: bool) -> None:
    spaces = [space_key(run.space) for run in (a, b)]
    if spaces[0] != spaces[1]:
        raise UserError(
            f"{first} searches space {spaces[0]!r} and {second} space {spaces[1]!r}; only runs of "
            "the same space can be merged"
        )
    for what in ("objectives", "evaluation_tokens"):
        values = [getattr(run.config.search, what) for run in (a, b)]
        if values[0] != values[1]:
            raise UserError(
                f"{first} has search.{what}={_shown(values[0])} and {second} "
                f"{_shown(values[1])}; only runs with the same can be merged; `nas search "
                f"{second}` with those of {first} makes them equal"
            )
    if a.config.task != b.config.task:
        raise UserError(f"{first} and {second} learn different tasks; their losses do not compare")
    if not mixed_weights and _weights(a) != _weights(b):
        raise UserError(
            f"the supernets of {first} and {second} differ, so their losses do not quite compare; "
            "merge runs of one supernet, or give --mixed-weights"
        )


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _weights(run: Pipeline) -> str:
    return weights_key(run.folder.supernet)


def _write(a: Pipeline, b: Pipeline, temporary: Path, out: Path) -> dict[str, int]:
    temporary.mkdir(parents=True)
    for part in PARTS:
        source = a.folder.path / part
        if source.is_dir():
            shutil.copytree(source, temporary / part)
        elif source.exists():
            shutil.copy2(source, temporary / part)
    config = dict(read_json(a.folder.config, "run config"))
    config["out"] = str(out)
    config["search"] = {**config["search"], "storage": ""}
    write_json(temporary / "config.json", config)
    return _merge_studies(a, b, temporary)


def _merge_studies(a: Pipeline, b: Pipeline, folder: Path) -> dict[str, int]:
    # Tables are only read here, not measured with, so they may be of other devices.
    prices = Prices(a.space, LatencyTable.load(a.folder.table), a.workload)
    config = a.config.search
    objectives = Objectives.parse(config.objectives, config.constraints, prices.metrics)
    target = open_study(
        sqlite_url(folder), objectives, space=space_key(a.space), weights=_weights(a)
    )

    def price(arch: Arch) -> Mapping[str, float]:
        return metrics_of(prices, a.space.encode(arch))

    copied = [
        sum(adopt(target, study, objectives, price)[0] for study in studies_at(run.storage))
        for run in (a, b)
    ]
    in_both = _arch_ids(a) & _arch_ids(b)
    return {"from_first": copied[0], "from_second": copied[1], "in_both": len(in_both)}


def _arch_ids(run: Pipeline) -> set[str]:
    trials = [study.get_trials(deepcopy=False) for study in studies_at(run.storage)]
    return {trial.user_attrs["arch_id"] for each in trials for trial in evaluations(each)}
