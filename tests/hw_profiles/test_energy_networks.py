from __future__ import annotations

import pytest
import torch

from hw_profiles.energy import EnergyReading, networks
from hw_profiles.energy.networks import measure_energies_mj
from hw_profiles.workload import decode, prefill
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet

WORKLOADS = (prefill(1, 8), decode(1, 8))


class Meter:
    """A meter that nobody reads: `measure_energy_mj` is replaced."""

    wraps_at_mj = float("inf")

    def __init__(self, kind: str) -> None:
        self.kind = self.name = kind

    def read_mj(self) -> float:
        return 0.0


@pytest.fixture
def subnets() -> dict[str, Subnet]:
    space = SearchSpace.load("decoder-tiny", 32)
    generator = torch.Generator().manual_seed(0)
    archs = {"large": space.largest(), "small": space.smallest()}
    return {name: Subnet(arch).reset(generator).pack().eval() for name, arch in archs.items()}


def test_without_a_meter_there_is_no_energy(
    subnets: dict[str, Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    for meters in ([], [Meter("gpu")]):
        monkeypatch.setattr(networks, "energy_meters", lambda meters=meters: meters)
        assert measure_energies_mj(subnets, WORKLOADS, "eager") == {}


def test_each_network_runs_each_workload_and_what_fails_is_absent(
    subnets: dict[str, Subnet], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, used = [], []
    for network in subnets.values():
        network.register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))

    def measure(call, seconds, meters, clock):  # type: ignore[no-untyped-def]
        call()
        used.append([meter.name for meter in meters])
        if len(used) == 4:
            return None
        return EnergyReading(float(len(used)), "cpu", 1.0, 2.0, seconds, 3)

    monkeypatch.setattr(networks, "energy_meters", lambda: [Meter("gpu"), Meter("cpu")])
    monkeypatch.setattr(networks, "measure_energy_mj", measure)
    found = measure_energies_mj(subnets, WORKLOADS, "eager")
    prompt, token = (item.name for item in WORKLOADS)
    assert found == {"large": {prompt: 1.0, token: 2.0}, "small": {prompt: 3.0}}
    assert shapes == [(1, 8), (1, 1)] * 2
    assert used == [["cpu"]] * 4
