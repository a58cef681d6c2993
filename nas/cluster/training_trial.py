"""One whole supernet training as one trial, by one process or by one of several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nas.calibration import calibrated_view
from nas.cluster.job_trials import TrialSpec
from nas.cluster.search_trial import Report
from nas.cluster.trial_folder import SUPERNET, Files, start_trial
from nas.evaluation import held_out_loss
from nas.pipeline import Pipeline
from nas.search_stage import validation_batches
from nas.training import TrainState, train_supernet
from nas.training.state import LOG
from nas.training.team import Alone, Team
from searchspace.supernet import Supernet

NUM_RANDOM = 8
"""Random archs, the same for every trial, whose mean held-out loss judges a training."""


def train_in(
    folder: Path,
    files: Files,
    spec: TrialSpec,
    report: Report,
    *,
    checkpoint: Path | None = None,
    checkpoint_s: float = 30.0,
    num_threads: int = 1,
    team: Team | None = None,
) -> None:
    """Train a supernet, or go on with a training, to its end.

    Args:
        folder: of the trial's run; what it holds is replaced.
        files: of the base run.
        spec: the hyperparameters.
        report: is told where the training stands, in every process equally often; in all but the
            first there are no metrics and nothing is saved.
        checkpoint: the folder of an earlier state, of whatever number of processes.
        checkpoint_s: seconds between reports.
        num_threads: of one operator.
        team: the processes that train together; None for this one alone.
    """
    pipeline = start_trial(folder, files, spec, checkpoint, num_threads)
    team = team or Alone()

    def tell(metrics: Mapping[str, Any]) -> None:
        report(metrics, lambda target: save_training(folder, target))

    def on_save(state: TrainState) -> None:
        if not state.done:
            tell(training_metrics(folder, state) if team.rank == 0 else {})

    supernet = train_supernet(
        pipeline.space,
        pipeline.task,
        replace(pipeline.config.train, checkpoint_s=checkpoint_s),
        folder / SUPERNET,
        seed=pipeline.config.seed,
        budget_s=pipeline.seconds_for("train"),
        reporter=pipeline.reporter,
        team=team,
        on_save=on_save,
    )
    tell({**held_out_losses(pipeline, supernet), "finished": True} if team.rank == 0 else {})


def training_metrics(folder: Path, state: TrainState) -> dict[str, Any]:
    """Return what a trial reports of its training: steps, seconds and the step's losses by role."""
    lines = (folder / SUPERNET / LOG).read_text(encoding="utf-8").splitlines()
    entry = json.loads(lines[-1]) if lines else {}
    shown = {f"train_{k}": v for k, v in entry.items() if k not in ("step", "elapsed_s")}
    return {"step": state.step, "elapsed_s": state.elapsed_s, "finished": False, **shown}


def held_out_losses(pipeline: Pipeline, supernet: Supernet) -> dict[str, float]:
    """Return what a finished training is judged by.

    Returns:
        Held-out losses with inherited weights in nats per unit of the task: ``loss_largest``,
        ``loss_smallest``, and ``loss_random``, the mean of random archs.
    """
    space, task = pipeline.space, pipeline.task
    batches = validation_batches(pipeline)
    rng = np.random.default_rng(0)
    archs = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(NUM_RANDOM))]
    losses = [held_out_loss(calibrated_view(supernet, arch, task), batches, task) for arch in archs]
    return {
        "loss_largest": losses[0],
        "loss_smallest": losses[1],
        "loss_random": float(np.mean(losses[2:])),
    }


def save_training(folder: Path, target: Path) -> None:
    """Copy weights, training state and log into a checkpoint's folder."""
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(folder / SUPERNET, target / SUPERNET, ignore=hidden, dirs_exist_ok=True)
