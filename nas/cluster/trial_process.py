"""What a process of Ray Tune does that is given a trial."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.cluster.job_trials import TrialSpec
from nas.cluster.train_workers import REFUSED, train_on_workers
from searchspace.errors import UserError


def run_trial(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Be one trial.

    Args:
        config: ``trial``, a `TrialSpec` as JSON.
        options: ``files`` (a reference into the object store), ``checkpoint_s``, ``num_threads``,
            ``experiment_path``, and ``workers`` of a training, which is None for a search.
    """
    spec = TrialSpec.from_dict(json.loads(config["trial"]))
    if options["workers"] is not None:
        _train(spec, options)
        return
    from ray import tune

    try:
        _search(spec, options)
    except UserError as error:
        # A second try would end the same, so this is no failure in the sense of Ray.
        tune.report({REFUSED: str(error)})


def _search(spec: TrialSpec, options: Mapping[str, Any]) -> None:
    import ray
    from ray import tune

    from nas.cluster.search_trial import search_in

    files, folder = ray.get(options["files"]), Path.cwd() / "run"
    arguments: dict[str, Any] = {key: options[key] for key in ("checkpoint_s", "num_threads")}
    started_from = tune.get_checkpoint()
    if started_from is None:
        search_in(folder, files, spec, _report, **arguments)
        return
    with started_from.as_directory() as state:
        search_in(folder, files, spec, _report, checkpoint=Path(state), **arguments)


def _report(metrics: Mapping[str, Any], save: Any) -> None:
    from ray import tune

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        save(Path(folder))
        tune.report(dict(metrics), checkpoint=tune.Checkpoint.from_directory(folder))


def _train(spec: TrialSpec, options: Mapping[str, Any]) -> None:
    """Let workers train, which keep their checkpoints in the trial's folder of the storage."""
    from ray.tune.integration.ray_train import TuneReportCallback

    storage_path = f"{options['experiment_path']}/{spec.label}"
    train_on_workers(
        spec, options["files"], options["workers"], storage_path, callbacks=[TuneReportCallback()]
    )
