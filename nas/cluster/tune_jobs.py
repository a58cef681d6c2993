"""A job on Ray Tune: every trial is one whole search or one whole training.

A Tune trial costs 0.2 to 1.6 s, which is nothing for these and far too much for one candidate.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nas.cluster.job_config import JobConfig
from nas.cluster.job_trials import TrialSpec
from nas.cluster.train_workers import REFUSED, Workers, resources
from nas.cluster.trial_folder import Files
from nas.cluster.trial_process import run_trial
from nas.progress import Reporter
from searchspace.errors import UserError

KEPT_CHECKPOINTS = 3
SNAPSHOT_S = 10.0
"""Seconds between what Tune writes of an experiment; a checkpoint younger than that is lost to a
kill of the driver."""
NOT_SHARED = "Unable to set up cluster storage"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Args:
        spec: the trial.
        metrics: its last report.
        checkpoint: Ray's handle of its last state; None before the first.
        error: why it failed, in one line; empty where it did not.
        finished: whether it came to its end.
    """

    spec: TrialSpec
    metrics: Mapping[str, Any]
    checkpoint: Any
    error: str
    finished: bool


def run_trials(
    job: JobConfig, trials: Sequence[TrialSpec], files: Files, resume: bool, reporter: Reporter
) -> list[Outcome]:
    """Run a job's trials on the connected cluster, or go on with them; return what became of each.

    Args:
        job: the job.
        trials: its trials; on resuming those of the first time.
        files: what every trial starts from.
        resume: go on with the experiment of the job's name.
        reporter: says when a trial reports.

    Raises:
        UserError: when there is an experiment and `resume` was not given, none and it was, or the
            storage is not shared by the nodes.
    """
    from ray import tune

    # Loggers of Tune other than the ones given would import TensorBoard.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(min(SNAPSHOT_S, job.checkpoint_s))
    held = _holds_experiment(job)
    trainable = _trainable(job, files)
    if resume:
        if not held:
            raise UserError(
                f"{job.storage_path} holds no experiment {job.name!r} to resume; leave out "
                "--resume to begin it"
            )
        tuner = tune.Tuner.restore(
            job.experiment_path, trainable, resume_unfinished=True, resume_errored=True
        )
    elif held:
        raise UserError(
            f"{job.storage_path} holds an experiment {job.name!r} already; give --resume to go on "
            "with it, or another name"
        )
    else:
        tuner = _new_tuner(job, trials, trainable, reporter)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        # Tune prints a table of the experiment however quiet it is asked to be.
        results = tuner.fit()
    outcomes = _outcomes(trials, [results[i] for i in range(len(results))], results.filesystem)
    if unshared := [outcome for outcome in outcomes if NOT_SHARED in outcome.error]:
        raise UserError(
            f"storage={job.storage!r} is not shared: trial {unshared[0].spec.label} ran on a node "
            "that does not see it; give a path on a file system that all nodes mount, or a URI "
            "such as s3://bucket/folder"
        )
    return outcomes


def _outcomes(
    trials: Sequence[TrialSpec], results: Sequence[Any], filesystem: Any
) -> list[Outcome]:
    """Return what became of each trial; a folder of the storage bears its label."""
    by_label = {str(result.path).rstrip("/").rpartition("/")[2]: result for result in results}
    return [
        _outcome(spec, by_label[spec.label], filesystem)
        if spec.label in by_label
        else Outcome(spec, {}, None, "", False)
        for spec in trials
    ]


def _outcome(spec: TrialSpec, result: Any, filesystem: Any) -> Outcome:
    from ray import tune
    from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY

    metrics = dict(result.metrics or {})
    checkpoint = result.checkpoint
    if checkpoint is None and CHECKPOINT_PATH_KEY in metrics:
        checkpoint = tune.Checkpoint(metrics[CHECKPOINT_PATH_KEY], filesystem)
    error = _reason(result.error) or str(metrics.get(REFUSED, ""))
    return Outcome(spec, metrics, checkpoint, error, bool(metrics.get("finished")) and not error)


def _reason(error: Exception | None) -> str:
    """Return what went wrong in one line, without Ray's traceback."""
    if error is None:
        return ""
    text = str(error).strip()
    if NOT_SHARED in text:
        return NOT_SHARED
    lines = text.splitlines() or [type(error).__name__]
    last = lines[-1].strip()
    name, _, rest = last.partition(": ")
    return rest if name.endswith("UserError") and rest else last


def _holds_experiment(job: JobConfig) -> bool:
    from ray import tune

    try:
        return bool(tune.Tuner.can_restore(job.experiment_path))
    except Exception as error:
        # Whatever a file system or a cloud's library raises.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot use storage={job.storage!r}: {reason}") from error


def _new_tuner(
    job: JobConfig, trials: Sequence[TrialSpec], trainable: Any, reporter: Reporter
) -> Any:
    from ray import tune

    texts = [json.dumps(trial.to_dict()) for trial in trials]
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(texts)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=_max_concurrent(job),
            trial_name_creator=_label_of,
            trial_dirname_creator=_label_of,
        ),
        run_config=tune.RunConfig(
            name=job.name,
            storage_path=job.storage_path,
            failure_config=tune.FailureConfig(max_failures=job.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            callbacks=_callbacks(reporter),
            verbose=0,
        ),
    )


def _callbacks(reporter: Reporter) -> list[Any]:
    """Return Tune's own result files, and what says on stderr where the trials stand."""
    from ray import tune
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

    class Saying(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            Reporter(quiet).say(f"{_label_of(trial)}: {in_words(result)}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            Reporter(quiet).say(f"{_label_of(trial)}: failed")

    quiet = reporter.quiet
    return [Saying(), JsonLoggerCallback(), CSVLoggerCallback()]


def in_words(metrics: Mapping[str, Any]) -> str:
    """Return a trial's report in one line."""
    if REFUSED in metrics:
        return str(metrics[REFUSED])
    if "evaluations" in metrics:
        text = (
            f"{metrics['evaluations']} evaluated, front {metrics['front']}, hypervolume "
            f"{metrics['hypervolume']:.4f}, best loss {metrics.get('best', math.nan):.4g}"
        )
    elif "loss_random" in metrics:
        text = (
            f"held-out loss of the largest {metrics['loss_largest']:.4g}, the smallest "
            f"{metrics['loss_smallest']:.4g}, random ones {metrics['loss_random']:.4g}"
        )
    else:
        losses = [f"{k.removeprefix('train_')} {v:.3g}" for k, v in metrics.items()
                  if k.startswith("train_")]  # fmt: skip
        text = f"step {metrics.get('step', 0)}, {', '.join(losses)}"
    return f"{text}, done" if metrics.get("finished") else text


def _max_concurrent(job: JobConfig) -> int | None:
    """Return how many trials may run at once; None for as many as Tune finds room for.

    Workers of a training ask for their processors on their own, so too many trainings at once
    would each hold some and wait for the rest for ever.
    """
    if job.max_concurrent or job.training is None:
        return job.max_concurrent or None
    import ray

    cpus = ray.cluster_resources().get("CPU", 1.0)
    return max(1, int(cpus // (job.training.num_workers * job.cpus)))


def _label_of(trial: Any) -> str:
    return str(json.loads(trial.config["trial"])["label"])


def _trainable(job: JobConfig, files: Files) -> Any:
    """Return what Tune runs, with the base run in the object store."""
    import ray
    from ray import tune

    # Who only waits for workers needs no processor of its own, yet Ray wants something asked for.
    needed = {"memory": 1.0} if job.training is not None else resources(job.cpus, job.gpus)
    options = {
        "files": ray.put(dict(files)),
        "checkpoint_s": job.checkpoint_s,
        "num_threads": max(1, int(job.cpus)),
        "workers": _workers_of(job),
        "experiment_path": job.experiment_path,
    }
    return tune.with_resources(
        tune.with_parameters(run_trial, options=options), tune.PlacementGroupFactory([needed])
    )


def _workers_of(job: JobConfig) -> Workers | None:
    if job.training is None:
        return None
    return Workers(job.training.num_workers, job.cpus, job.gpus, job.max_failures, job.checkpoint_s)
