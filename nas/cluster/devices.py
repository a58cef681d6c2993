"""Devices of a cluster: nodes that offer a resource ``hw:NAME``, and work done alone on one.

A node of a device is started with ``--resources='{"hw:NAME": 1, "hw_probe": 1}'``. Who times
something there holds ``hw_probe`` and every processor of the node, so that nothing else of the
cluster runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nas.cluster.device_probe import Probe
from searchspace.errors import UserError

PREFIX, PROBE = "hw:", "hw_probe"
TELL_S = 10.0


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Args:
        id: Ray's.
        name: host and address.
        resources: what it has in all.
    """

    id: str
    name: str
    resources: Mapping[str, float]

    @property
    def devices(self) -> list[str]:
        """Names of the devices that it is."""
        return [key.removeprefix(PREFIX) for key in self.resources if key.startswith(PREFIX)]


def living_nodes() -> list[Node]:
    """Return the nodes of the connected cluster."""
    import ray

    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def node_of(device: str, nodes: Sequence[Node]) -> Node:
    """Return a node that is a device and can be had alone.

    Raises:
        UserError: when there is none; says which nodes have what.
    """
    found = [node for node in nodes if device in node.devices]
    have = "; ".join(f"{node.name} has {_offers(node)}" for node in nodes)
    if not found:
        raise UserError(
            f"no node of the cluster offers {PREFIX}{device} ({have}); start one with ray start "
            f'--address=HEAD --resources=\'{{"{PREFIX}{device}": 1, "{PROBE}": 1}}\''
        )
    for node in found:
        if node.resources.get(PROBE, 0.0) >= 1:
            return node
    raise UserError(
        f"no node that offers {PREFIX}{device} offers {PROBE} too, without which nothing can be "
        f"timed alone there ({have}); start it with ray start --address=HEAD "
        f'--resources=\'{{"{PREFIX}{device}": 1, "{PROBE}": 1}}\''
    )


@contextmanager
def alone_on(
    device: str, say: Callable[[str], None], patience_s: float
) -> Iterator[Callable[..., Any]]:
    """Have a device to oneself while the block runs.

    Args:
        device: its name.
        say: tells the user something.
        patience_s: seconds to wait until it is free.

    Yields:
        A function that calls a method of `Probe` on the device: its name, then its arguments.

    Raises:
        UserError: when there is no such device, it does not become free, or it is lost meanwhile.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = node_of(device, living_nodes())
    probe: Any = (
        ray.remote(Probe)
        .options(
            num_cpus=node.resources.get("CPU", 0.0),
            num_gpus=node.resources.get("GPU", 0.0),
            resources={PREFIX + device: 1, PROBE: 1},
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        .remote()
    )

    def call(method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(probe, method).remote(*arguments))
        except ray.exceptions.RayActorError as error:
            raise UserError(
                f"device {device} was lost while it was measured ({node.name}): "
                f"{str(error).strip().splitlines()[-1]}; the same command goes on from here"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from error

    try:
        ready = probe.ready.remote()
        if not ray.wait([ready], timeout=TELL_S)[0]:
            say(f"waiting until nothing else runs on device {device}, {node.name}")
            if not ray.wait([ready], timeout=patience_s)[0]:
                raise UserError(
                    f"device {device} ({node.name}) did not become free in {patience_s:.0f} s: "
                    "other jobs hold its processors; end them, or raise ray.patience_s"
                )
        call("ready")
        yield call
    finally:
        ray.kill(probe)


def _offers(node: Node) -> str:
    """Return a node's resources in words; those of its own address say nothing."""
    parts = [
        f"{key}: {value:g}"
        for key, value in sorted(node.resources.items())
        if key in ("CPU", "GPU", PROBE) or key.startswith(PREFIX)
    ]
    return ", ".join(parts) or "nothing"
