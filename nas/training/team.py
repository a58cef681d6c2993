"""Processes that train one supernet together, and which of a step's work each of them takes.

What a step trains is a list of archs on one batch. Archs are spread over the processes; only where
there are more processes than archs is the batch split too, so that the first stage, which trains
one arch, is ordinary data parallelism. Every process draws the same archs and the same batch, so
nothing but gradients and losses has to be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nas.arch_sampling import LARGEST, StepArch
from searchspace.cost import arch_cost, num_params
from searchspace.supernet import Supernet

TEACHING_SHARE = 1 / 3
"""A forward pass, of a forward and a backward one that is about twice as long."""


@dataclass(frozen=True)
class Share:
    """What one process trains of a step.

    Args:
        archs: places in the step's list of archs, in order.
        rows: of the batch.
    """

    archs: tuple[int, ...]
    rows: slice


class Team(Protocol):
    """Processes that train one supernet together, seen from one of them."""

    @property
    def rank(self) -> int:
        """Which of them this is; the one of rank 0 decides, logs and writes."""
        ...

    def share(self, archs: Sequence[StepArch], num_rows: int) -> Share:
        """Return what this process trains of a step with a batch of `num_rows`."""
        ...

    def agree(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return rank 0's values; they must be JSON."""
        ...

    def take_weights(self, supernet: Supernet) -> None:
        """Give every process the weights and running statistics of rank 0."""
        ...

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""
        ...

    def sum_gradients(self, supernet: Supernet) -> None:
        """Replace each parameter's gradient by the sum over all processes; None counts as zero."""
        ...


class Alone:
    """A team of one process."""

    rank = 0

    def share(self, archs: Sequence[StepArch], num_rows: int) -> Share:
        """Take everything."""
        return Share(tuple(range(len(archs))), slice(0, num_rows))

    def agree(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values."""
        return dict(values)

    def take_weights(self, supernet: Supernet) -> None:
        """Leave the weights as they are."""

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def sum_gradients(self, supernet: Supernet) -> None:
        """Leave the gradients as they are."""


def spread(archs: Sequence[StepArch], num_rows: int, size: int) -> list[Share]:
    """Return what each of `size` processes trains of a step.

    Up to as many processes as archs share the archs: rank 0 the largest, rank 1 the smallest, the
    rest the random ones; where they are fewer, each next arch goes to the one that has the least
    to do by then, in parameters. A process without the largest runs it forward all the same where
    it teaches, which is counted. More processes form groups, each with its own rows of the batch.
    What is left of `size` when every arch is trained row by row has nothing to do.

    Source: Yu et al. 2020, "BigNAS", section 3.1 (what a sandwich step consists of); the spread
    is this project's own.
    """
    num_groups = max(1, min(-(-size // max(1, len(archs))), num_rows))
    shares: list[Share | None] = [None] * size
    for group in range(num_groups):
        rows = slice(num_rows * group // num_groups, num_rows * (group + 1) // num_groups)
        ranks = range(group, size, num_groups)
        for rank, places in zip(ranks, _dealt(archs, len(ranks)), strict=True):
            shares[rank] = Share(tuple(places), rows)
    return [share for share in shares if share is not None]


def _dealt(archs: Sequence[StepArch], num_processes: int) -> list[list[int]]:
    """Deal archs to processes one after another, each to the one with the least to do."""
    costs = [arch_cost(item.arch, num_params) for item in archs]
    teaching = TEACHING_SHARE * costs[0] if archs and archs[0].role == LARGEST else 0.0
    loads = [0.0] + [teaching] * (num_processes - 1)
    hands: list[list[int]] = [[] for _ in range(num_processes)]
    for place, cost in enumerate(costs):
        least = loads.index(min(loads))
        hands[least].append(place)
        loads[least] += cost
    return hands
