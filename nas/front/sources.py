"""What the final measurements need of a run."""

from __future__ import annotations

from dataclasses import dataclass

from hw_profiles.latency_table import LatencyTable
from nas.candidates import Objectives
from nas.tasks.base import Task
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet


@dataclass(frozen=True)
class FrontSources:
    """What the final measurements need.

    Args:
        space, supernet, task, table: of the run.
        objectives: of the search.
        workload: the workload that ``latency_ms`` means.
        seed: of the random archs and the timing order.
        task_name: for the report.
    """

    space: SearchSpace
    supernet: Supernet
    task: Task
    table: LatencyTable
    objectives: Objectives
    workload: str
    seed: int
    task_name: str
