"""`nas cluster`: a job of whole searches or whole trainings on Ray, merged at the end."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.cluster.connection import connect
from nas.cluster.job_config import JobConfig, load_job
from nas.cluster.job_trials import TABLE, TrialSpec, device_tables, trials_of
from nas.cluster.merge_results import Found, merge_searches, merge_trainings
from nas.cluster.trial_folder import Files, base_files
from nas.cluster.tune_jobs import Outcome, run_trials
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.training import read_state
from searchspace.errors import UserError
from searchspace.files import read_json, write_json

JOB = "job.json"


def cluster_command(options: argparse.Namespace) -> int:
    """Run a job; return 0, or 1 when a trial failed and what the others found was merged.

    Raises:
        UserError: for a job that cannot be run.
        KeyboardInterrupt: when it was interrupted; `--resume` goes on.
    """
    job = load_job(options.job)
    reporter = Reporter(options.quiet)
    trials = trials_of(job)
    check_resumed(job, trials, options.resume)
    files = prepared_files(job, reporter)
    write_json(Path(job.out) / JOB, _described(job, trials))
    reporter.say(f"{len(trials)} trials of {job.name}, kept at {job.experiment_path}")
    with connect(options.ray):
        outcomes = run_trials(job, trials, files, options.resume, reporter)
        if not all(outcome.finished or outcome.error for outcome in outcomes):
            # Tune answers Ctrl-C by saving the experiment and returning what there is.
            reporter.say("the job is cut off; with --resume it goes on")
            raise KeyboardInterrupt
        results = merged(job, files, outcomes)
    _print(job, results, outcomes, options.json)
    return 1 if any(outcome.error for outcome in outcomes) else 0


def prepared_files(job: JobConfig, reporter: Reporter) -> Files:
    """Return what every trial starts from; a base run that is given as a config is made first.

    Raises:
        UserError: when a run folder lacks what it takes.
    """
    tables = device_tables(job.search.devices) if job.search is not None else {}
    path = Path(job.run).expanduser()
    if path.is_dir():
        folder = path
        if not (folder / "config.json").is_file():
            raise UserError(f"run={job.run!r} is no run folder: it has no config.json")
    else:
        pipeline = Pipeline(load_config(str(path)), reporter)
        folder = pipeline.folder.path
        pipeline.task  # noqa: B018  (all trials share its tokens)
        if job.search is not None:
            if not tables:
                pipeline.profile()
            pipeline.train()
    if job.search is not None:
        _check_base(folder, has_tables=bool(tables))
    return base_files(folder, tables, with_supernet=job.search is not None)


def _check_base(folder: Path, has_tables: bool) -> None:
    state = read_state(folder / "supernet")
    if state is None or not state.done:
        raise UserError(f"{folder} holds no trained supernet; run `nas train {folder}` first")
    if not has_tables and not (folder / TABLE).is_file():
        raise UserError(
            f"{folder} holds no latency table; run `nas profile {folder}`, or name devices in "
            "search.devices"
        )


def _described(job: JobConfig, trials: Sequence[TrialSpec]) -> dict[str, Any]:
    return {
        "experiment": job.experiment_path,
        "run": job.run,
        "trials": [trial.to_dict() for trial in trials],
    }


def check_resumed(job: JobConfig, trials: Sequence[TrialSpec], resume: bool) -> None:
    """Refuse to resume a job whose trials are others now: Tune keeps those it began with.

    Raises:
        UserError: naming a trial that is new or gone.
    """
    path = Path(job.out) / JOB
    if not resume or not path.is_file():
        return
    before = read_json(path, "job")
    if before["experiment"] != job.experiment_path:
        return
    held = {trial["label"] for trial in before["trials"]}
    if odd := sorted(held ^ {trial.label for trial in trials}):
        raise UserError(
            f"the experiment {job.name!r} was begun with other trials ({odd[0]} is on one side "
            "only); resume it with the same job, and give what is new another name"
        )


def merged(job: JobConfig, files: Files, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Merge what the trials left, of searches that failed too."""
    with tempfile.TemporaryDirectory() as work:
        found = []
        for index, outcome in enumerate(outcomes):
            usable = job.search is not None or outcome.finished
            if outcome.checkpoint is None or not usable:
                continue
            # A copy: a database that is opened is written to.
            state = Path(outcome.checkpoint.to_directory(str(Path(work) / str(index))))
            found.append(Found(outcome.spec, state, outcome.metrics))
        if not found:
            return []
        merge = merge_searches if job.search is not None else merge_trainings
        return merge(job, files, found)


def _print(
    job: JobConfig, results: list[dict[str, Any]], outcomes: Sequence[Outcome], as_json: bool
) -> None:
    failed = {outcome.spec.label: outcome.error for outcome in outcomes if outcome.error}
    if as_json:
        print(json.dumps({"results": results, "failed": failed}))
        return
    from rich.console import Console

    console = Console()
    for result in results if job.search is not None else []:
        console.print(_search_table(result))
        print(f"run:      {result['folder']}")
        print(f"report:   {result['report']}")
    if job.training is not None and results:
        console.print(_training_table(results))
        print(f"best:     {results[0]['folder']}")
    for label, reason in failed.items():
        print(f"failed:   {label}: {reason}")
    if failed:
        print("`nas cluster --resume` tries failed trials again")


def _search_table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=result["device"] or None)
    for name in ("search", "evaluated", "best loss", "hypervolume"):
        table.add_column(name, justify="left" if name == "search" else "right")
    for row in result["trials"]:
        best = "" if row["best"] is None else f"{row['best']:.4g}"
        table.add_row(row["label"], str(row["evaluations"]), best, f"{row['hypervolume']:.4f}")
    table.add_row("all", str(result["evaluations"]), "", f"{result['hypervolume']:.4f}")
    return table


def _training_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    names = ("loss_random", "loss_largest", "loss_smallest")
    for name in ("training", *names):
        table.add_column(name, justify="left" if name == "training" else "right")
    for row in rows:
        figures = [f"{row[name]:.4g}" if name in row else "" for name in names]
        table.add_row(row["label"], *figures)
    return table
