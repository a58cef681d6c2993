"""Assigned networks really evaluated, as trials of the run's own study."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from nas.calibration import calibrated_view
from nas.evaluation import EvaluationFailed, evaluation_amount, held_out_loss
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import SearchProblem, SearchRun
from searchspace.arch import Arch

BATCH_SIZE = 8


def evaluated_losses(
    pipeline: Pipeline, archs: Sequence[Arch], reporter: Reporter
) -> dict[str, float]:
    """Evaluate archs as the run's search does, and return their losses by arch id.

    Each becomes a trial of the run's study, where a later search, the front and the report find
    it; what was evaluated before is read from there. One that breaks a constraint of the run's own
    search cannot become a trial, and is only evaluated.

    Args:
        pipeline: the run.
        archs: networks of the run's space.
        reporter: shows progress.

    Returns:
        Losses in nats per unit; archs that cannot be evaluated are left out.
    """
    if not archs:
        return {}
    supernet, task = pipeline.supernet, pipeline.task
    amount = evaluation_amount(task, pipeline.config.search.evaluation_tokens)
    batches = task.evaluation_batches("validation", amount, BATCH_SIZE)

    def evaluate(arch: Arch) -> float:
        return held_out_loss(calibrated_view(supernet, arch, task), batches, task)

    problem = SearchProblem(
        pipeline.space, pipeline.prices, pipeline.objectives, evaluate, seeds=tuple(archs)
    )
    search = SearchRun(problem, pipeline.storage, "random", pipeline.config.seed)
    losses: dict[str, float] = {}
    with reporter.bar("evaluation") as bar:
        for index, arch in enumerate(archs):
            if _breaks(pipeline, arch):
                with contextlib.suppress(EvaluationFailed):
                    losses[arch.id] = evaluate(arch)
            elif (loss := _trial_loss(search, arch)) is not None:
                losses[arch.id] = loss
            bar.update((index + 1) / len(archs), f"{index + 1} of {len(archs)}")
    return losses


def _trial_loss(search: SearchRun, arch: Arch) -> float | None:
    """Return an arch's loss by a trial of the study; None where it becomes none."""
    params = search.params_of(arch)
    waiting = _waiting(search)
    if arch.id not in search.losses and params not in waiting:
        search.study.enqueue_trial(params)
    # What an interrupted search has left waiting comes first.
    for _ in range(len(waiting) + 1):
        if arch.id in search.losses or params not in _waiting(search):
            break
        search.step()
    return search.losses.get(arch.id)


def _waiting(search: SearchRun) -> list[dict[str, object]]:
    trials = search.study.get_trials(deepcopy=False)
    return [t.system_attrs.get("fixed_params", {}) for t in trials if t.state.name == "WAITING"]


def _breaks(pipeline: Pipeline, arch: Arch) -> bool:
    """Whether an arch breaks a constraint of the run's own search."""
    genotype = pipeline.space.canonical(pipeline.space.encode(arch)[None])
    return any(
        pipeline.prices.of(c.metric, genotype)[0] > c.limit
        for c in pipeline.objectives.exact_constraints
    )
