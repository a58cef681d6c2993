"""Timing whole networks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from hw_profiles.backends import get_backend
from hw_profiles.samples import Timing
from hw_profiles.timing import Sentinel, measured_sentinel, time_interleaved
from hw_profiles.workload import Workload
from searchspace.ends import example_inputs
from searchspace.subnet import Subnet

Progress = Callable[[float, str], None]

GROUP_BYTES = 1536 * 2**20
GROUP = 400
"""Weights and number of networks timed in one session, over all of which the moods of the machine
average out."""
SUBNET_ROUNDS = 60
SUBNET_ERROR = 0.007
"""Relative standard error at which a session is done."""
SUBNET_SAMPLE_MS = 2.5


def measure_subnets(
    subnets: Mapping[str, Subnet],
    workloads: Sequence[Workload],
    *,
    backend: str = "eager",
    rounds: int | None = None,
    min_sample_ms: float | None = None,
    reference_us: float | None = None,
    time_budget_s: float | None = None,
    seed: int = 0,
    realtime: bool = False,
    progress: Progress | None = None,
) -> dict[str, dict[str, Timing]]:
    """Time whole networks, interleaved in groups.

    Args:
        subnets: packed networks in evaluation mode, by any id.
        workloads: what to run.
        backend: a name in `BACKENDS`.
        rounds: rounds at most; None takes `SUBNET_ROUNDS`.
        min_sample_ms: of each sample; None takes `SUBNET_SAMPLE_MS`.
        reference_us: sentinel time that latencies are stated for; give a table's `sentinel_us` to
            compare with it. None measures it now.
        time_budget_s: time to aim at; rounds are saved, down to a minimum.
        seed: of the token ids and the order.
        realtime: use real-time scheduling.
        progress: called with the share that is done (0 to 1) and a text.

    Returns:
        Timings by id and workload name.

    Raises:
        UserError: when the backend cannot be used here, or cannot run a network.
        TooBusyError: when the machine is too busy to time anything.
    """
    runs_on = get_backend(backend)
    if reference_us is None:
        reference_us = measured_sentinel(runs_on, realtime).reference_us
    sentinel = Sentinel(runs_on.sentinel(), reference_us)
    generator = torch.Generator().manual_seed(seed)
    groups = _groups(subnets)
    steps = [(workload, group) for group in groups for workload in workloads]
    result: dict[str, dict[str, Timing]] = {name: {} for name in subnets}
    for index, (workload, group) in enumerate(steps):
        calls = {}
        for name in group:
            ends = subnets[name].arch.ends
            inputs = example_inputs(ends, workload.batch, workload.new_tokens, generator)
            calls[name] = runs_on.prepare(subnets[name], inputs, workload)
        with runs_on.clock() as clock:
            timings = time_interleaved(
                calls,
                rounds=rounds or SUBNET_ROUNDS,
                rng=random.Random(seed),
                sentinel=sentinel,
                time_budget_s=None if time_budget_s is None else time_budget_s / len(steps),
                target_error=SUBNET_ERROR,
                min_sample_ms=min_sample_ms or SUBNET_SAMPLE_MS,
                realtime=realtime,
                clock=clock,
            )
        for name, timing in timings.items():
            result[name][workload.name] = timing
        if progress:
            progress((index + 1) / len(steps), f"{workload.name}")
    return result


def _groups(subnets: Mapping[str, Subnet]) -> list[list[str]]:
    """Return the ids in groups that fit into memory together."""
    groups: list[list[str]] = []
    total_bytes = 0
    for name, network in subnets.items():
        total_bytes += network.weight_bytes()
        if not groups or total_bytes > GROUP_BYTES or len(groups[-1]) >= GROUP:
            groups.append([])
            total_bytes = network.weight_bytes()
        groups[-1].append(name)
    return groups
