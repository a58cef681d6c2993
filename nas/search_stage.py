"""The search stage: what is evaluated and how, by one process or by several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nas.calibration import calibrated_view
from nas.candidates import Objectives, Prices
from nas.evaluation import evaluation_amount, held_out_loss
from nas.feasibility import feasible_start
from nas.front import uniform_networks
from nas.samplers import SAMPLERS
from nas.study import (
    Evaluated,
    SearchProblem,
    SearchRun,
    evaluated,
    nearest,
    nearest_sentence,
    search_summary,
    weights_key,
)
from nas.warm_start import training_free_score
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from hw_profiles.latency_table import LatencyTable
    from nas.pipeline import Pipeline
    from searchspace.space import SearchSpace

MAX_AGREEMENT = 40


def check_sampler(name: str, metrics: tuple[str, ...]) -> None:
    """Refuse a sampler that is unknown or lacks what it needs.

    Raises:
        UserError: for either.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if name == "promotion" and not metrics:
        raise UserError(
            "search.sampler='promotion' promotes by training-free metrics and search.metrics is "
            "empty; name one, such as search.metrics=synflow"
        )


def check_feasible(pipeline: Pipeline, table: LatencyTable | None) -> None:
    """Refuse constraints that no arch keeps; without a table only bytes and parameters count.

    Raises:
        UserError: naming what blocks and the nearest values that are reachable.
    """
    config = pipeline.config.search
    if not config.constraints:
        return
    prices = Prices(pipeline.space, table, pipeline.workload)
    timed = [f"{workload.phase}_ms" for workload in pipeline.workloads]
    known = [*prices.metrics, "latency_ms", *timed]
    objectives = Objectives.parse(config.objectives, config.constraints, known)
    try:
        feasible_start(pipeline.space, prices, objectives)
    except UserError:
        pipeline.take_back_config()
        raise


def search_problem(pipeline: Pipeline) -> SearchProblem:
    """Return what a run searches; training-free metrics are computed where they are not yet."""
    space, supernet, task = pipeline.space, pipeline.supernet, pipeline.task
    config = pipeline.config.search
    batches = validation_batches(pipeline)

    def evaluate(arch: Arch) -> float:
        return held_out_loss(calibrated_view(supernet, arch, task), batches, task)

    scores = training_free_score(
        space,
        config.metrics,
        config.metric_pool,
        pipeline.metric_batch(),
        pipeline.folder.metric_scores,
        seed=pipeline.config.seed,
        reporter=pipeline.reporter,
    )
    weights = weights_key(pipeline.folder.supernet)
    return SearchProblem(
        space, pipeline.prices, pipeline.objectives, evaluate, scores, anchors(space), weights
    )


def anchors(space: SearchSpace) -> tuple[Arch, ...]:
    """Return what a search evaluates first: the largest arch, uniform ones, the largest's kin."""
    uniform = uniform_networks(space).values()
    return space.largest(), *uniform, *space.one_change_from_largest()


def validation_batches(pipeline: Pipeline) -> list[tuple[Tensor, Tensor]]:
    """Return the inputs and targets that candidates are judged by."""
    amount = evaluation_amount(pipeline.task, pipeline.config.search.evaluation_tokens)
    return pipeline.task.evaluation_batches("validation", amount, 8)


def join_search(pipeline: Pipeline) -> SearchRun:
    """Return this process's part in a run's search."""
    config = pipeline.config.search
    return SearchRun(
        search_problem(pipeline),
        pipeline.storage,
        config.sampler,
        pipeline.config.seed,
        config.population,
    )


def take_part(
    pipeline: Pipeline, budget_s: float, should_stop: Callable[[], bool] = lambda: False
) -> SearchRun:
    """Evaluate until the search is done.

    Args:
        pipeline: the run.
        budget_s: seconds, where no number of evaluations is given.
        should_stop: asked between evaluations.
    """
    search = join_search(pipeline)
    search.run(pipeline.config.search.num_evaluations, budget_s, pipeline.reporter, should_stop)
    return search


def search_stage(pipeline: Pipeline) -> None:
    """Search archs with the supernet's weights, and write `search.json`."""
    config = pipeline.config.search
    check_sampler(config.sampler, config.metrics)
    if not pipeline.config.ray.devices:
        check_feasible(pipeline, pipeline.table)
    if pipeline.config.ray.address:
        from nas.cluster.search import search_on_cluster

        search = search_on_cluster(pipeline, pipeline.seconds_for("search"))
    elif config.workers > 1:
        from nas.search_workers import run_workers

        search = run_workers(pipeline, pipeline.seconds_for("search"))
    else:
        search = take_part(pipeline, pipeline.seconds_for("search"))
    items = evaluated(search.study)
    summary = search_summary(search.study, pipeline.objectives, config.sampler)
    agreement = _metric_agreement(pipeline, items)
    write_json(pipeline.folder.search, {**summary, "metrics": agreement})
    pipeline.reporter.say(
        f"search: {search.num_evaluations} archs of {pipeline.space.size():.2g} evaluated, "
        f"best loss {search.best_loss():.3f} nats/{pipeline.task.unit}"
    )
    if found := nearest(search.study, pipeline.objectives):
        pipeline.reporter.say(f"warning: {nearest_sentence(found, len(items))}")


def _metric_agreement(pipeline: Pipeline, items: list[Evaluated]) -> dict[str, Any]:
    """Return how well each training-free metric orders archs by their evaluated loss."""
    from scipy.stats import kendalltau

    from predictors.zero_cost import score_archs

    items = items[:: max(1, len(items) // MAX_AGREEMENT)]
    if len(items) < 3:
        return {}
    index = pipeline.objectives.names.index("loss")
    losses = [item.values[index] for item in items]
    names = tuple(dict.fromkeys(("params", *pipeline.config.search.metrics)))
    archs = [item.arch for item in items]
    scores = score_archs(names, archs, pipeline.metric_batch(), pipeline.config.seed)
    return {
        name: {
            "kendall_tau": float(kendalltau(values, [-loss for loss in losses]).statistic),
            "num_archs": len(items),
        }
        for name, values in scores.items()
    }
