"""Searching for several devices, without Ray: nodes, costs on each of them, their fronts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hw_profiles.latency_table import LatencyTable
from hw_profiles.workload import Workload
from nas.candidates import Constraint, Objectives
from nas.cluster.config import RayConfig
from nas.cluster.device_fronts import chosen_fronts, counting, still_on_front
from nas.cluster.device_prices import DevicePrices, known_metrics, objectives_for, objectives_of
from nas.cluster.devices import Node, node_of
from nas.study import Evaluated
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.nas.conftest import synthetic_table

WORKLOAD = "prefill_b1_t64"
NODES = [
    Node("1", "head (10.0.0.1)", {"CPU": 8, "memory": 1e9, "node:10.0.0.1": 1}),
    Node("2", "pi (10.0.0.2)", {"CPU": 4, "hw:pi": 1, "hw_probe": 1}),
    Node("3", "orin (10.0.0.3)", {"CPU": 6, "GPU": 1, "hw:orin": 1}),
    Node("4", "new (10.0.0.4)", {}),
]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", 384, {"kind": "decoder"})


@pytest.fixture(scope="module")
def tables(space: SearchSpace) -> dict[str, LatencyTable]:
    """On b softmax is slow and everything else fast, so that neither device is always slower."""
    found = {"a": synthetic_table(space), "b": synthetic_table(space)}
    for (_, key), entry in found["b"].entries.items():
        factor = 3.0 if "softmax" in key else 0.5
        object.__setattr__(entry, "latency_us", entry.latency_us * factor)
    return found


def test_a_missing_device_is_told_with_what_each_node_has() -> None:
    assert node_of("pi", NODES) is NODES[1]
    with pytest.raises(UserError) as error:
        node_of("jetson", NODES)
    text = str(error.value)
    assert text.startswith("no node of the cluster offers hw:jetson (head (10.0.0.1) has CPU: 8; ")
    assert "pi (10.0.0.2) has CPU: 4, hw:pi: 1, hw_probe: 1" in text
    assert "new (10.0.0.4) has nothing" in text and '{"hw:jetson": 1, "hw_probe": 1}' in text
    with pytest.raises(UserError, match="offers hw_probe too") as error:
        node_of("orin", NODES)
    assert "orin (10.0.0.3) has CPU: 6, GPU: 1, hw:orin: 1" in str(error.value)


def test_devices_without_a_cluster_are_refused() -> None:
    with pytest.raises(UserError, match="no cluster is given"):
        RayConfig(devices=("a",))


def test_the_worst_latency_is_that_of_the_slowest_device_for_each_arch(
    space: SearchSpace, tables: dict[str, LatencyTable]
) -> None:
    prices = DevicePrices(space, tables, WORKLOAD)
    rows = space.sample_genotypes(np.random.default_rng(0), 40)
    workload = Workload.parse(WORKLOAD)
    slow = {name: [table.latency_ms(space.decode(row), workload) for row in rows]
            for name, table in tables.items()}  # fmt: skip
    for name in tables:
        np.testing.assert_allclose(prices.of(f"latency_ms@{name}", rows), slow[name])
    worst = np.max(list(slow.values()), axis=0)
    assert 0 < sum(worst == slow["a"]) < len(rows), "one device is always slower"
    np.testing.assert_allclose(prices.of("latency_ms", rows), worst)
    np.testing.assert_allclose(
        prices.of_all(["latency_ms", "weight_bytes", "latency_ms@b"], rows),
        np.stack([worst, prices.of("weight_bytes", rows), slow["b"]], axis=1),
    )


def test_objectives_of_each_device_and_constraints_on_one() -> None:
    names = ("loss", "latency_ms", "weight_bytes")
    assert objectives_for(names, ("a", "b"), "worst") == names
    each = objectives_for(names, ("a", "b"), "each")
    assert each == ("loss", "latency_ms@a", "latency_ms@b", "weight_bytes")
    assert objectives_of(each, "b") == [0, 2, 3]
    known = known_metrics(["params", "latency_ms"], ("jetson-orin",))
    assert known == ["params", "latency_ms", "latency_ms@jetson-orin"]
    objectives = Objectives.parse(("loss",), ["latency_ms@jetson-orin<=2.5"], known)
    assert objectives.constraints == (Constraint("latency_ms@jetson-orin", 2.5),)


def test_one_front_each_is_chosen_by_what_counts_for_the_device(space: SearchSpace) -> None:
    names = ("loss", "latency_ms@a", "latency_ms@b", "weight_bytes")
    archs = [space.largest(), space.smallest(), *space.one_change_from_largest()[:2]]
    costs = [(1.0, 9.0, 1.0), (2.0, 1.0, 9.0), (3.0, 2.0, 5.0), (4.0, 0.5, 8.0)]
    values = [(*cost, 5.0) for cost in costs]
    items = [Evaluated(arch, value, True) for arch, value in zip(archs, values, strict=True)]
    fronts = chosen_fronts(items, names, ("a", "b"), "each", 8)
    members = {name: [items.index(item) for item in front] for name, front in fronts.items()}
    assert {name: sorted(found) for name, found in members.items()} == {"a": [0, 1, 3], "b": [0]}
    worst = chosen_fronts(items, names, ("a", "b"), "worst", 8)
    assert sorted(items.index(item) for item in worst["worst"]) == [0, 1, 2, 3]


def test_what_measures_worse_than_another_leaves_the_front() -> None:
    def measured(arch_id: str, loss: float, a: float, b: float) -> dict[str, Any]:
        latencies = {"a": a, "b": b}
        return {
            "arch_id": arch_id,
            "search_loss": loss,
            "weight_bytes": 10,
            "measured": {d: {"latency_ms": {WORKLOAD: ms}} for d, ms in latencies.items()},
        }

    records = [measured("x", 1.0, 2.0, 5.0), measured("y", 1.5, 1.0, 6.0),
               measured("z", 2.0, 1.5, 4.0)]  # fmt: skip
    names = ("loss", "latency_ms", "weight_bytes")
    front = still_on_front(records, *counting("worst", names, ("a", "b")), WORKLOAD)
    assert [record["arch_id"] for record in front] == ["x", "z"]
    names = ("loss", "latency_ms@a", "latency_ms@b", "weight_bytes")
    assert counting("a", names, ("a", "b")) == (["loss", "latency_ms@a", "weight_bytes"], ["a"])
    front = still_on_front(records, *counting("a", names, ("a", "b")), WORKLOAD)
    assert [record["arch_id"] for record in front] == ["x", "y"]
    assert still_on_front([], names, ("a",), WORKLOAD) == []
