"""The whole way of `nas profile --backend cuda`, on a made-up GPU whose memory is the CPU's."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hw_profiles import energy, library, profiler
from hw_profiles.backends import cuda
from hw_profiles.backends.cuda import device as cuda_device
from hw_profiles.backends.cuda import precisions
from hw_profiles.energy import networks
from hw_profiles.latency_table import MEASURED, LatencyTable
from hw_profiles.profiler import calibration, filling, profile
from hw_profiles.roofline import Peaks
from hw_profiles.targets import random_subnets
from hw_profiles.workload import decode, prefill
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.hw_profiles.backends.conftest import FakeGpu

WORKLOADS = (prefill(1, 8), decode(1, 8))
LOW = ("bf16", "int8", "int4")


def space(*names: str) -> SearchSpace:
    return SearchSpace(
        name="toy",
        vocab_size=32,
        d_model=(32,),
        head_dim=16,
        num_layers=2,
        mixers={"softmax": {}, "gla": {}},
        heads=((2, 1),),
        intermediate_size=(32,),
        mixer_precision=names,
        ffn_precision=names,
        ffn=("gelu",),
    )


@pytest.fixture
def quick(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu.facts.L2_cache_size = 20_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(cuda, "RAMP_S", 0.0)
    monkeypatch.setattr(cuda_device, "driver_version", lambda: "570.86.15")
    monkeypatch.setattr(precisions, "use_triton", lambda *given: True)
    peaks = Peaks({"fp32": 5e4, "bf16": 7e5}, {"4194304": 4e3}, 1.0, 1e-3)
    monkeypatch.setattr(profiler, "measure_peaks", lambda *given, **options: peaks)
    monkeypatch.setattr(filling, "ROUNDS", 4)
    monkeypatch.setattr(filling, "PASS_ROUNDS", 2)
    monkeypatch.setattr(calibration, "DEFAULT_NETWORKS", 12)
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    return gpu


def test_a_table_is_measured_and_loaded(quick: FakeGpu, tmp_path: Path) -> None:
    path = tmp_path / "latency_table.json"
    made = profile(space(*LOW), WORKLOADS, path, backend="cuda", num_threads=1)
    table = LatencyTable.load(path)
    assert table.device == made.device
    assert table.device.backend == "cuda" and "H100" in table.measured_on
    assert {entry.source for entry in table.entries.values()} == {MEASURED}
    keys = {key for _, key in table.entries}
    assert all(any(f"/{name}" in key for key in keys) for name in LOW)
    arch = space(*LOW).largest()
    assert all(table.latency_ms(arch, workload) > 0 for workload in WORKLOADS)
    assert profile(space(*LOW), WORKLOADS, path, backend="cuda").entries == table.entries
    # Made-up times add up to nothing; all else is in order.
    assert all("predicted with an error" in fault for fault in library._faults(table))


def test_a_precision_without_a_kernel_is_refused_with_what_to_do(
    quick: FakeGpu, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"fp8 map of .*leave the precision out"):
        profile(space("fp8"), WORKLOADS, tmp_path / "table.json", backend="cuda")


def test_energy_of_networks_is_that_of_the_gpu(
    quick: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a joule for each start of a graph, beside 70 W all the time."""

    for module in (energy, networks):
        monkeypatch.setattr(module, "MIN_WINDOW_S", 0.2)
    monkeypatch.setattr(energy, "BURST_S", 0.02)

    def energy_mj(handle: object) -> float:
        return 70.0 * time.perf_counter_ns() / 1e6 + 500.0 * quick.replays

    nvml: Any = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetName=lambda handle: "NVIDIA H100",
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetTotalEnergyConsumption=energy_mj,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    quick.facts.uuid = "aaaa"
    subnets = random_subnets([space("fp32").smallest()], 0)
    found = networks.measure_energies_mj(subnets, WORKLOADS[:1], "cuda")
    assert found[next(iter(subnets))][WORKLOADS[0].name] > 0
