"""One supernet trained by several workers of Ray Train, from inside a Tune trial."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.cluster.job_trials import TrialSpec
from searchspace.errors import UserError

REFUSED = "refused"
"""A reported reason why a trial ended that would end the same if tried again."""
FOLDER = "workers"
"""Of the trial's folder in the storage: where Ray Train keeps its checkpoints."""


@dataclass(frozen=True)
class Workers:
    """What trains a supernet together.

    Args:
        number: of processes.
        cpus: processors of each.
        gpus: of each.
        max_failures: how often all are started again after one has died.
        checkpoint_s: seconds between checkpoints.
    """

    number: int
    cpus: float
    gpus: float
    max_failures: int
    checkpoint_s: float


def train_on_workers(
    spec: TrialSpec, files: Any, workers: Workers, storage_path: str, **options: Any
) -> None:
    """Train, or go on with a training, on workers of their own; each checkpoint is reported.

    A training of the same storage path goes on from its last checkpoint, on as many workers as
    there are now.

    Args:
        spec: the hyperparameters.
        files: of the base run, as a reference into Ray's object store.
        workers: how many, and what each gets.
        storage_path: of the trial, an absolute path or a URI.
        options: of `ray.train.RunConfig`.
    """
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "spec": spec.to_dict(),
            "files": [files],
            "checkpoint_s": workers.checkpoint_s,
            "num_threads": max(1, int(workers.cpus)),
        },
        # Works on every node; those on GPUs make another group (`nas.training.distributed`).
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=workers.number,
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources(workers.cpus, workers.gpus),
        ),
        run_config=train.RunConfig(
            name=FOLDER,
            storage_path=storage_path,
            failure_config=train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            **options,
        ),
    )
    trainer.fit()


def resources(cpus: float, gpus: float) -> dict[str, float]:
    """Return Ray's names of what a process gets."""
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _work(config: Mapping[str, Any]) -> None:
    """Be one of the workers."""
    import ray
    from ray import train

    from nas.cluster.training_trial import train_in
    from nas.training import TrainingDiverged
    from nas.training.distributed import Ranks

    team = Ranks()
    report = _reporting(train, team.rank)
    started_from = train.get_checkpoint()
    arguments: dict[str, Any] = {
        "checkpoint_s": config["checkpoint_s"],
        "num_threads": config["num_threads"],
        "team": team,
    }
    files, spec = ray.get(config["files"][0]), TrialSpec.from_dict(config["spec"])
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as work, contextlib.ExitStack() as stack:
        if started_from is not None:
            state = stack.enter_context(started_from.as_directory())
            arguments["checkpoint"] = Path(state)
        try:
            train_in(Path(work) / "run", files, spec, report, **arguments)
        except (UserError, TrainingDiverged) as error:
            # Every worker comes to the same end, now as on a second try.
            train.report({REFUSED: str(error)})


def _reporting(train: Any, rank: int) -> Callable[..., None]:
    """Return what tells Ray Train; every worker has to call it, and the first one saves."""

    def report(metrics: Mapping[str, Any], save: Callable[[Path], None]) -> None:
        if rank != 0:
            train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            save(Path(folder))
            train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(folder))

    return report
