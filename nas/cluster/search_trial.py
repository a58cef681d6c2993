"""One whole search as one trial: the pipeline's search stage, with reports and checkpoints.

The trial's study is the only owner of the search's state. A trial that is taken up again goes on
from the study in its last checkpoint; what it evaluated after that is evaluated again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.cluster.job_trials import TrialSpec
from nas.cluster.trial_folder import Files, read_sampler, save_study, start_trial
from nas.pareto import hypervolume
from nas.pipeline import Pipeline
from nas.samplers.random_state import random_state, restore_random_state
from nas.search_stage import check_feasible, join_search, validation_batches
from nas.study import SearchRun, evaluated, snapshot
from nas.training.losses import num_scored

Report = Callable[[Mapping[str, Any], Callable[[Path], None]], None]
"""Takes metrics, and a function that writes the state they belong to into an empty folder."""

BUDGETS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Numbers of evaluations after which the best loss is reported."""


def search_in(
    folder: Path,
    files: Files,
    spec: TrialSpec,
    report: Report,
    *,
    checkpoint: Path | None = None,
    checkpoint_s: float = 30.0,
    num_threads: int = 1,
) -> None:
    """Search, or go on with a search, to its end.

    Args:
        folder: of the trial's run; what it holds is replaced.
        files: of the base run.
        spec: what is searched how.
        report: is told where the search stands.
        checkpoint: the folder of an earlier state.
        checkpoint_s: seconds between reports.
        num_threads: of one operator.

    Raises:
        UserError: when no arch keeps the constraints, or the base run lacks what it takes.
    """
    pipeline = start_trial(folder, files, spec, checkpoint, num_threads)
    check_feasible(pipeline, pipeline.table)
    search = join_search(pipeline)
    if checkpoint is not None:
        restore_random_state(search.study.sampler, read_sampler(checkpoint))
    reports = _Reports(search, worst_values(pipeline), folder, report, checkpoint_s)
    config = pipeline.config.search
    search.run(
        config.num_evaluations, pipeline.seconds_for("search"), pipeline.reporter, reports.look
    )
    reports.tell(finished=True)


class _Reports:
    """Tells where a search stands, now and then.

    Args:
        search: the search.
        worst: see `search_metrics`.
        folder: of the trial's run.
        report: is told.
        interval_s: seconds between reports.
    """

    def __init__(
        self,
        search: SearchRun,
        worst: Sequence[float],
        folder: Path,
        report: Report,
        interval_s: float,
    ) -> None:
        self._search, self._worst = search, worst
        self._folder, self._report = folder, report
        self._interval_s, self._last = interval_s, time.monotonic()

    def look(self) -> bool:
        """Report if it is time; asked between evaluations whether to stop, and never does."""
        if time.monotonic() - self._last >= self._interval_s:
            self.tell()
        return False

    def tell(self, finished: bool = False) -> None:
        """Report metrics and state."""
        state = random_state(self._search.study.sampler)
        metrics = {**search_metrics(self._search, self._worst), "finished": finished}
        self._report(metrics, lambda target: save_study(self._folder, target, state))
        self._last = time.monotonic()


def worst_values(pipeline: Pipeline) -> list[float]:
    """Return for each objective what no network worth having exceeds.

    They are the loss of guessing uniformly, in the task's unit, and the largest network's costs.
    """
    space, task = pipeline.space, pipeline.task
    batches = validation_batches(pipeline)
    outputs = space.family.num_classes or space.vocab_size
    scored = sum(num_scored(targets) for _, targets in batches)
    units = sum(task.units_of(targets) for _, targets in batches)
    metrics = dict(pipeline.exact_metrics(space.largest()))
    metrics["loss"] = math.log(outputs) * scored / units
    return [metrics[name] for name in pipeline.objectives.names]


def search_metrics(search: SearchRun, worst: Sequence[float]) -> dict[str, Any]:
    """Return what a trial reports of its search.

    Args:
        search: the search.
        worst: a value of each objective.

    Returns:
        ``evaluations``, ``failed``, ``front`` (members), ``hypervolume`` (the share of the box
        between 0 and the worst values that the front dominates: it never falls, and compares
        between searches for one device), ``best`` (the lowest loss that keeps the constraints),
        and ``best_at_N`` after the first N evaluations.
    """
    now = snapshot(search.study, search.problem.objectives)
    place = search.problem.objectives.names.index("loss")
    losses = [item.values[place] if item.feasible else math.inf for item in evaluated(search.study)]
    front = np.array([values for _, values in now.front]).reshape(-1, len(worst)) / np.array(worst)
    at = {f"best_at_{n}": min(losses[:n]) for n in BUDGETS if n <= len(losses)}
    best = {"best": min(losses)} if now.front else {}
    return {
        "evaluations": now.num_evaluated,
        "failed": now.num_failed,
        "front": len(now.front),
        "hypervolume": hypervolume(front, np.ones(len(worst))),
        **best,
        **{name: value for name, value in at.items() if math.isfinite(value)},
    }
