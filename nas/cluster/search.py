"""`nas search --ray`: the search of a run, evaluated on a cluster."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from hw_profiles.process import usable_processors
from nas.cluster.actors import Facts
from nas.cluster.config import RayConfig
from nas.cluster.connection import connect
from nas.cluster.evaluator import ActorSearch
from nas.cluster.pool import ActorPool
from nas.cluster.versions import check_versions, versions_here
from nas.study import SearchRun, evaluated

if TYPE_CHECKING:
    from nas.pipeline import Pipeline


def search_on_cluster(pipeline: Pipeline, budget_s: float) -> SearchRun:
    """Search with actors of a Ray cluster; the study stays in this process.

    Args:
        pipeline: the run.
        budget_s: seconds, where no number of evaluations is given.

    Raises:
        UserError: when there is no cluster, or it has no room, or other versions.
    """
    from nas.cluster.device_fronts import write_device_fronts
    from nas.cluster.device_tables import profile_devices
    from nas.search_stage import join_search

    config = pipeline.config.ray
    limit = pipeline.config.search.num_evaluations
    # Ray says on stdout when a process died; that is for results.
    with redirect_stdout(sys.stderr), connect(config.address, num_cpus=num_cpus_here(config)):
        if config.devices:
            profile_devices(pipeline)
        search = join_search(pipeline)
        if limit is None or search.num_evaluations < limit:
            evaluate_on_actors(pipeline, search, budget_s)
        if config.devices:
            write_device_fronts(pipeline, evaluated(search.study))
    return search


def profile_on_cluster(pipeline: Pipeline) -> None:
    """Measure the latency tables of a run's devices, or go on with them.

    Raises:
        UserError: when there is no cluster, or a device is not there or does not become free.
    """
    from nas.cluster.device_tables import profile_devices

    config = pipeline.config.ray
    with redirect_stdout(sys.stderr), connect(config.address, num_cpus=num_cpus_here(config)):
        profile_devices(pipeline, all_of_it=True)


def evaluate_on_actors(pipeline: Pipeline, search: SearchRun, budget_s: float) -> None:
    """Search on the connected cluster.

    Args:
        pipeline: the run.
        search: this process's part in its search.
        budget_s: seconds, where no number of evaluations is given.
    """
    import ray

    from nas.cluster.shipment import packed, unpacked
    from nas.search_stage import validation_batches

    config = pipeline.config.ray
    shipment = packed(pipeline.supernet, pipeline.task, validation_batches(pipeline))
    pool: ActorPool[int] = ActorPool(
        unpacked,
        ray.put(shipment),
        num_wanted=functools.partial(num_actors, config),
        cpus=config.cpus,
        num_threads=config.num_threads,
        check=functools.partial(check_actor, versions_here()),
        say=pipeline.reporter.say,
        patience_s=config.patience_s,
    )
    try:
        ahead = 0 if config.actors == 1 else 1
        limit = pipeline.config.search.num_evaluations
        ActorSearch(search, pool, limit, ahead).run(budget_s, pipeline.reporter)
    finally:
        pool.stop()


def num_cpus_here(config: RayConfig) -> int:
    """Return the processors of a Ray that is started here: room for as many actors as wanted."""
    return max(usable_processors(), math.ceil(config.actors * config.cpus))


def num_actors(config: RayConfig) -> int:
    """Return how many actors there should be now."""
    import ray

    if config.actors:
        return config.actors
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(node.get("CPU", 0.0) / config.cpus + 1e-9) for node in nodes)


def check_actor(here: Mapping[str, str], facts: Facts) -> None:
    """Refuse an actor of other versions than this process has.

    Raises:
        UserError: naming its node.
    """
    check_versions(here, facts.versions, facts.node)
