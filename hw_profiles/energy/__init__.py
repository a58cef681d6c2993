"""Energy of a workload, from the counters a machine really has.

Where there is none, there is no energy: it is neither zero nor guessed from a model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hw_profiles.backends.base import Call
from hw_profiles.backends.cuda.graph_call import repeats_of
from hw_profiles.clock import Clock
from hw_profiles.energy.nvml import nvml_meters
from hw_profiles.energy.rapl import POWERCAP, rapl_meters
from searchspace.errors import UserError

MIN_WINDOW_S, MAX_WINDOW_S = 2.0, 60.0
"""Counters of GPUs are renewed every 20 to 100 ms, so a shorter window is off by more than 5 %;
those of processors may start again from 0 twice within a longer one."""
BURST_S = 0.25
"""Calls between two looks at the time."""

log = logging.getLogger(__name__)


class EnergyMeter(Protocol):
    """A counter of energy."""

    @property
    def name(self) -> str:
        """What is counted, and by what."""

    @property
    def kind(self) -> str:
        """``"cpu"`` or ``"gpu"``."""

    @property
    def wraps_at_mj(self) -> float:
        """Where the counter starts again from 0; infinite where it does not."""

    def read_mj(self) -> float:
        """Return the counter in millijoule."""


@dataclass(frozen=True)
class EnergyReading:
    """What one call of a workload consumes beyond an idle machine.

    Args:
        energy_mj: millijoule for one run, the idle machine's share subtracted.
        meter: names of the meters, which are added up.
        idle_watts: what they showed while nothing ran; subtracted.
        busy_watts: what they showed during the window.
        window_s: how long the calls ran.
        num_calls: how many they were.
    """

    energy_mj: float
    meter: str
    idle_watts: float
    busy_watts: float
    window_s: float
    num_calls: int


def energy_meters(powercap: Path = POWERCAP) -> list[EnergyMeter]:
    """Return the meters of this machine: GPUs by NVML, processor packages by RAPL; often none.

    Args:
        powercap: folder of Linux's power capping zones.
    """
    return [*nvml_meters()[0], *rapl_meters(powercap)[0]]


def missing_meters(powercap: Path = POWERCAP) -> list[str]:
    """Return one sentence for each reason why `energy_meters` has no more."""
    return [*nvml_meters()[1], *rapl_meters(powercap)[1]]


def measure_energy_mj(
    call: Call, seconds: float, meters: Sequence[EnergyMeter], clock: Clock
) -> EnergyReading | None:
    """Measure what one run of a call consumes; None where that cannot be measured.

    The machine is left idle for as long as the calls then run, to know what to subtract.

    Args:
        call: what a backend prepared.
        seconds: length of the window, and of the idle one before it.
        meters: those of the device the call runs on; they are added up. None given, None returned.
        clock: of the call's backend; it waits for the device.

    Raises:
        UserError: for a window that is too short or too long for the counters.
    """
    if not meters:
        return None
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise UserError(
            f"seconds={seconds:g} is no window that energy counters can measure: choose "
            f"{MIN_WINDOW_S:g} to {MAX_WINDOW_S:g} seconds"
        )
    with torch.inference_mode():
        burst = _burst(call, clock)
        before_idle = _Snapshot.of(meters, clock)
        clock.sleep(seconds)
        idle_watts = before_idle.watts_until(_Snapshot.of(meters, clock), meters)
        clock.elapsed_ns(call, burst)
        began, num_calls = _Snapshot.of(meters, clock), 0
        while clock.now_ns() - began.time_ns < seconds * 1e9:
            clock.elapsed_ns(call, burst)
            num_calls += burst
        ended = _Snapshot.of(meters, clock)
    busy_watts = began.watts_until(ended, meters)
    window_s = (ended.time_ns - began.time_ns) / 1e9
    names = " + ".join(meter.name for meter in meters)
    if busy_watts <= idle_watts:
        log.warning(
            "%s showed no more power with the workload (%.1f W) than without (%.1f W): no energy "
            "is stated; stop other programs and measure again",
            names,
            busy_watts,
            idle_watts,
        )
        return None
    energy_mj = (busy_watts - idle_watts) * window_s * 1e3 / num_calls
    return EnergyReading(energy_mj, names, idle_watts, busy_watts, window_s, num_calls)


def _burst(call: Call, clock: Clock) -> int:
    """Return how many runs take about `BURST_S`; a multiple of what one call makes."""
    repeats = repeats_of(call)
    call_ns = min(clock.elapsed_ns(call, repeats) for _ in range(3))
    return repeats * max(1, math.ceil(BURST_S * 1e9 / call_ns))


@dataclass(frozen=True)
class _Snapshot:
    """All counters at one time."""

    time_ns: int
    counters_mj: tuple[float, ...]

    @classmethod
    def of(cls, meters: Sequence[EnergyMeter], clock: Clock) -> _Snapshot:
        counters_mj = tuple(meter.read_mj() for meter in meters)
        return cls(clock.now_ns(), counters_mj)

    def watts_until(self, later: _Snapshot, meters: Sequence[EnergyMeter]) -> float:
        """Return the mean power of all meters together."""
        total_mj = 0.0
        for meter, before, after in zip(meters, self.counters_mj, later.counters_mj, strict=True):
            total_mj += after - before if after >= before else after - before + meter.wraps_at_mj
        return total_mj * 1e6 / (later.time_ns - self.time_ns)
