from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hw_profiles import energy
from hw_profiles.backends.cuda.graph_call import GraphCall
from hw_profiles.energy import EnergyMeter, energy_meters, measure_energy_mj, missing_meters
from hw_profiles.energy.rapl import rapl_meters
from searchspace.errors import UserError
from tests.hw_profiles.conftest import FakeClock

CALL_US = 400.0
RANGE_UJ = 262_143_328_850


@dataclass
class FakeMeter:
    """A counter driven by a fake clock: some watts always, more while a call runs."""

    clock: FakeClock
    idle_watts: float
    call_mj: float
    calls: list[int]
    start_mj: float = 0.0
    wraps_at_mj: float = math.inf
    name: str = "fake"
    kind: str = "cpu"

    def read_mj(self) -> float:
        total = self.start_mj + self.idle_watts * self.clock.time_ns / 1e6
        total += self.call_mj * len(self.calls)
        return total % self.wraps_at_mj if math.isfinite(self.wraps_at_mj) else total


def counted(clock: FakeClock, repeats: int = 1) -> tuple[Callable[[], None], list[int]]:
    """Return a call that takes `CALL_US` for each run, and the list that it grows by one."""
    calls: list[int] = []
    spend = clock.call(CALL_US)

    def call() -> None:
        for _ in range(repeats):
            calls.append(1)
            spend()

    return call, calls


def test_idle_power_is_subtracted() -> None:
    clock = FakeClock()
    call, calls = counted(clock)
    reading = measure_energy_mj(call, 3.0, [FakeMeter(clock, 55.0, 2.5, calls)], clock)
    assert reading is not None
    assert reading.energy_mj == pytest.approx(2.5, rel=1e-6)
    assert reading.idle_watts == pytest.approx(55.0)
    assert reading.busy_watts == pytest.approx(55.0 + 2.5 / CALL_US * 1e3)
    assert reading.meter == "fake"
    assert 3.0 <= reading.window_s < 3.0 + 2 * energy.BURST_S
    assert reading.num_calls * CALL_US / 1e6 == pytest.approx(reading.window_s)
    assert clock.slept_s == 3.0


def test_meters_are_added_up() -> None:
    clock = FakeClock()
    call, calls = counted(clock)
    meters = [FakeMeter(clock, 10.0, 1.0, calls, name=name) for name in ("left", "right")]
    reading = measure_energy_mj(call, 2.0, meters, clock)
    assert reading is not None
    assert reading.energy_mj == pytest.approx(2.0)
    assert reading.idle_watts == pytest.approx(20.0)
    assert reading.meter == "left + right"


def test_counters_may_start_again_from_zero() -> None:
    clock = FakeClock()
    call, calls = counted(clock)
    meter = FakeMeter(clock, 50.0, 8.0, calls, wraps_at_mj=300_000.0)
    for start_mj in range(0, 300_000, 35_000):
        meter.start_mj = float(start_mj)
        reading = measure_energy_mj(call, 2.0, [meter], clock)
        assert reading is not None
        assert reading.energy_mj == pytest.approx(8.0)


def test_a_call_of_several_runs_counts_as_many() -> None:
    class Device(FakeClock):
        def elapsed_ns(self, call: Callable[[], object], count: int) -> int:
            return super().elapsed_ns(call, count // 10)

    clock = Device()
    call, calls = counted(clock, repeats=10)
    graph = GraphCall(SimpleNamespace(replay=call), 10)
    reading = measure_energy_mj(graph, 2.0, [FakeMeter(clock, 70.0, 0.5, calls)], clock)
    assert reading is not None
    assert reading.energy_mj == pytest.approx(0.5)
    assert reading.num_calls % 10 == 0


def test_without_a_meter_there_is_no_energy() -> None:
    clock = FakeClock()
    call, calls = counted(clock)
    assert measure_energy_mj(call, 2.0, [], clock) is None
    assert not calls


def test_what_the_meter_does_not_see_is_not_zero(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    call, calls = counted(clock)
    with caplog.at_level(logging.WARNING):
        assert measure_energy_mj(call, 2.0, [FakeMeter(clock, 55.0, 0.0, calls)], clock) is None
    assert "no energy is stated" in caplog.text


@pytest.mark.parametrize("seconds", [0.5, 61.0])
def test_windows_that_counters_cannot_measure_are_refused(seconds: float) -> None:
    clock = FakeClock()
    call, calls = counted(clock)
    with pytest.raises(UserError, match="choose 2 to 60 seconds"):
        measure_energy_mj(call, seconds, [FakeMeter(clock, 55.0, 1.0, calls)], clock)


def zone(root: Path, name: str, label: str, energy_uj: object = 5_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, with what must not be counted beside them or again."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:0:1", "dram")
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:2", "psys")
    zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    return tmp_path


def test_only_packages_are_counted(powercap: Path) -> None:
    meters, reasons = rapl_meters(powercap)
    assert [meter.name for meter in meters] == ["RAPL package-0", "RAPL package-1"]
    assert [meter.read_mj() for meter in meters] == [5000.0, 7000.0]
    assert {meter.wraps_at_mj for meter in meters} == {RANGE_UJ / 1e3}
    assert {meter.kind for meter in meters} == {"cpu"} and not reasons


def test_rapl_measures_across_its_end(powercap: Path) -> None:
    """The counter starts again from 0 while the calls run."""
    clock = FakeClock()
    file = powercap / "intel-rapl:0" / "energy_uj"
    spend = clock.call(CALL_US)
    start_uj = RANGE_UJ - 200_000_000

    def call() -> None:
        spend()
        calls.append(1)

    calls: list[int] = []

    meter = rapl_meters(powercap)[0][0]

    class Updated:
        name, kind, wraps_at_mj = meter.name, meter.kind, meter.wraps_at_mj

        def read_mj(self) -> float:
            total_uj = start_uj + int(30.0 * clock.time_ns / 1e3) + 40_000 * len(calls)
            file.write_text(f"{total_uj % RANGE_UJ}\n")
            return meter.read_mj()

    reading = measure_energy_mj(call, 2.0, [Updated()], clock)
    assert reading is not None
    assert meter.read_mj() < 1e6
    assert reading.energy_mj == pytest.approx(40.0, rel=1e-6)


def test_unreadable_counters_are_absent_with_the_reason(
    powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text

    def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj" and path.parent.name == "intel-rapl:0":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("")
    meters, reasons = rapl_meters(powercap)
    assert not meters and len(reasons) == 2
    assert "run as root" in reasons[0] and "intel-rapl:1 cannot be read" in reasons[1]


class NVMLError(Exception):
    pass


class FakePynvml:
    """What is used of NVIDIA's package, for two GPUs of which the second has no counter."""

    NVMLError = NVMLError

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver
        self.energy_mj = 1234

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        for index in range(2):
            if self.nvmlDeviceGetUUID(index) == uuid:
                return index
        raise NVMLError("Not Found")

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return "NVIDIA H100 80GB HBM3" if handle == 0 else b"NVIDIA H100 80GB HBM3 MIG 1g.10gb"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-aaaa" if handle == 0 else "MIG-bbbb"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle == 1:
            raise NVMLError("Not Supported")
        return self.energy_mj


def test_gpus_with_a_counter_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meters = energy_meters(tmp_path)
    assert [(meter.name, meter.kind) for meter in meters] == [
        ("NVML NVIDIA H100 80GB HBM3 GPU-aaaa", "gpu")
    ]
    assert meters[0].read_mj() == 1234.0 and meters[0].wraps_at_mj == math.inf
    reasons = missing_meters(tmp_path)
    assert len(reasons) == 2
    assert "MIG 1g.10gb MIG-bbbb has no energy counter (Not Supported)" in reasons[0]
    assert "RAPL" in reasons[1]


@pytest.mark.parametrize(("uuid", "found"), [("aaaa", 1), ("bbbb", 0), ("cccc", 0)])
def test_only_the_gpu_in_use_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uuid: str, found: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakePynvml())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert len(energy_meters(tmp_path)) == found
    assert len(missing_meters(tmp_path)) == 2 - found


class FakeLibrary:
    """NVML's C functions, for one GPU."""

    def __init__(self) -> None:
        self.energy_mj = 2**40
        self.nvmlErrorString = lambda status: {6: b"Not Found", 3: b"Not Supported"}[status]

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 4096 + index.value
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        handle._obj.value = 4096
        return 0 if uuid.value == b"GPU-aaaa" else 6

    def nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> int:
        text.value = b"NVIDIA H200"
        return 0 if size.value == len(text) else 7

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, size: Any) -> int:
        text.value = b"GPU-aaaa"
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        assert handle.value == 4096
        energy._obj.value = self.energy_mj
        return 0 if self.energy_mj else 3


@pytest.mark.parametrize(("uuid", "found"), [("aaaa", 1), ("GPU-aaaa", 1), ("cccc", 0)])
def test_without_the_package_the_drivers_library_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uuid: str, found: int
) -> None:
    library = FakeLibrary()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (meter,) = energy_meters(tmp_path)
    assert (meter.name, meter.read_mj()) == ("NVML NVIDIA H200 GPU-aaaa", 2.0**40)
    library.energy_mj = 0
    assert "NVIDIA H200 GPU-aaaa has no energy counter (Not Supported)" in missing_meters()[0]
    library.energy_mj = 7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert len(energy_meters(tmp_path)) == found
    assert found or "Not Found" in missing_meters(tmp_path)[0]


def test_a_machine_without_meters_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = FakeClock()
    call, _ = counted(clock)
    for module, reason in ((None, "not installed"), (FakePynvml(driver=False), "Not Loaded")):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        meters: list[EnergyMeter] = energy_meters(tmp_path)
        assert meters == []
        assert measure_energy_mj(call, 2.0, meters, clock) is None
        assert reason in missing_meters(tmp_path)[0]
