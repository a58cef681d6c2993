"""What a search on a Ray cluster can be told: section ``[ray]`` of the config."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nas.cluster.connection import check_address
from searchspace.errors import UserError, unknown

GOALS = ("worst", "each")


@dataclass(frozen=True)
class RayConfig:
    """How candidates are evaluated on a cluster.

    Args:
        address: empty for no Ray; ``"local"`` for the cluster in RAY_ADDRESS, or else a Ray that
            is started here; ``"auto"`` for the cluster this machine is a node of; or HOST:PORT.
        actors: that evaluate at the same time; 0 for as many as the cluster has room for.
        cpus: processors of one actor; it computes with as many threads, rounded down.
        patience_s: seconds to wait for a node when there is none that has room for an actor.
        devices: names of devices to optimise for; a node is one that offers ``hw:NAME``.
        goal: with several devices, ``"worst"`` makes latencies those of the slowest for an arch,
            and ``"each"`` finds a front for each of them.

    Raises:
        UserError: for a value that is out of range.
    """

    address: str = ""
    actors: int = 0
    cpus: float = 1.0
    patience_s: float = 300.0
    devices: tuple[str, ...] = ()
    goal: str = "worst"

    def __post_init__(self) -> None:
        check_address(self.address)
        if self.actors < 0:
            raise UserError(f"ray.actors={self.actors} is negative; choose 0 or more")
        if self.cpus <= 0 or self.patience_s <= 0:
            raise UserError("ray.cpus and ray.patience_s have to be above 0")
        if self.goal not in GOALS:
            raise unknown("ray.goal", self.goal, GOALS)
        for name in self.devices:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(
                    f"ray.devices={name!r} is no device's name; it is the NAME of a node's "
                    "resource hw:NAME, of letters, digits, '.', '_' and '-'"
                )
        if self.devices and not self.address:
            raise UserError(
                "ray.devices are nodes of a Ray cluster and no cluster is given; add --ray auto or "
                "--ray HOST:PORT"
            )
        if len(set(self.devices)) < len(self.devices):
            raise UserError("ray.devices names a device twice")

    @property
    def num_threads(self) -> int:
        """Threads of one actor."""
        return max(1, int(self.cpus))
