"""Whether a table still holds, on a machine whose every latency is known."""

from __future__ import annotations

import contextlib
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hw_profiles.backends import BACKENDS, get_backend
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.latency_table.correction import Correction
from hw_profiles.library import check, retiming
from hw_profiles.library.check import TableCheck, busy_here, busy_sentence, check_table
from hw_profiles.library.comparison import Ratios
from hw_profiles.library.retiming import sampled_entries
from hw_profiles.targets import even_ranks
from hw_profiles.workload import Workload, decode, prefill
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.hw_profiles.conftest import FakeClock
from tests.hw_profiles.test_device import DEVICE

WORKLOADS = (prefill(1, 8), decode(1, 8))
SENTINEL_US = 1000.0


def true_us(key: str, workload: Workload) -> float:
    """Return what a sub-block takes on the machine of these tests."""
    return 40.0 + zlib.crc32(f"{key} {workload.name}".encode()) % 900


class KnownBackend:
    """A machine on which a sub-block takes `true_us`, and a network the sum of its sub-blocks."""

    name, summary = "known", "for tests"
    clock_of_all = FakeClock()

    def unavailable(self) -> str:
        return ""

    def prepare(self, module: Any, inputs: object, workload: Workload) -> object:
        keys = [module.key] if hasattr(module, "key") else [s.key for s in module.arch.sub_blocks()]
        return self.clock_of_all.call(sum(true_us(key, workload) for key in keys))

    def sentinel(self) -> object:
        return self.clock_of_all.call(SENTINEL_US)

    @contextlib.contextmanager
    def clock(self) -> Iterator[FakeClock]:
        yield self.clock_of_all


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the machine, on which sub-blocks are known by their keys."""
    found = FakeClock()
    monkeypatch.setattr(KnownBackend, "clock_of_all", found)
    monkeypatch.setitem(BACKENDS, "known", KnownBackend)
    monkeypatch.setattr(retiming, "build_for_timing", lambda spec, _: SimpleNamespace(key=spec.key))
    return found


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", 32)


@pytest.fixture
def table(space: SearchSpace) -> LatencyTable:
    entries = {
        (item.name, spec.key): entry(true_us(spec.key, item))
        for item in WORKLOADS
        for spec in space.sub_blocks()
    }
    fits = {item.name: Correction(mape=1.0, num_networks=24) for item in WORKLOADS}
    device = replace(DEVICE, backend="known")
    return LatencyTable(device, WORKLOADS, SENTINEL_US, entries, fits, (space,))


def entry(latency_us: float, source: str = "measured") -> Entry:
    return Entry(latency_us / SENTINEL_US, latency_us, 0.0, 9, 1.0, True, "X", "2026-01-01", source)


@pytest.mark.usefixtures("clock")
def test_an_unchanged_machine_holds(table: LatencyTable) -> None:
    seen: list[float] = []
    found = check_table(table, progress=lambda done, text: seen.append(done))
    assert found.holds and found.reliable
    assert (found.entries.num, found.entries.near_pct) == (24, 100.0)
    assert found.entries.median == pytest.approx(1.0)
    assert found.networks is not None
    assert (found.networks.num, found.networks.median) == (8, pytest.approx(1.0))
    assert found.sentinel == pytest.approx(1.0)
    assert "the table still holds: 100 % of 24 sub-blocks" in found.verdict
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert json.loads(json.dumps(found.to_dict()))["holds"] is True


def test_a_slower_clock_is_said_but_does_not_count(table: LatencyTable, clock: FakeClock) -> None:
    clock.speed = lambda seconds: 1.7
    found = check_table(table)
    assert found.holds
    assert found.sentinel == pytest.approx(1.7)


@pytest.mark.usefixtures("clock")
def test_a_slower_machine_no_longer_holds(table: LatencyTable) -> None:
    table.entries = {key: entry(e.latency_us / 1.3) for key, e in table.entries.items()}
    found = check_table(table, num_networks=2)
    assert not found.holds
    assert found.networks is not None and found.networks.num == 4
    assert "sub-blocks take 1.30 times" in found.verdict
    assert "whole networks take 1.30 times" in found.verdict
    assert "run `nas profile` again" in found.verdict


@pytest.mark.usefixtures("clock")
def test_some_changed_kernels_are_found_and_named(table: LatencyTable) -> None:
    table.entries = {
        key: entry(e.latency_us * (3.0 if "/int8" in key[1] else 1.0))
        for key, e in table.entries.items()
    }
    found = check_table(table, num_entries=40, num_networks=0)
    assert not found.holds and found.networks is None
    assert "only" in found.verdict or "times what it says" in found.verdict
    assert all("/int8" in key for _, key, _ in found.worst)
    assert all(ratio == pytest.approx(1 / 3) for *_, ratio in found.worst)


def test_a_disturbed_check_says_nothing_about_the_table(
    table: LatencyTable, clock: FakeClock
) -> None:
    noise = random.Random(0)
    clock.disturbance = lambda: 3000.0 * noise.random()
    found = check_table(table, num_networks=0)
    assert not found.reliable and not found.holds
    assert "cannot be said" in found.verdict


def test_networks_may_be_off_by_twice_the_stated_error() -> None:
    good = Ratios.of([1.0] * 9)
    for tolerance_pct, holds in ((10.0, False), (30.0, True)):
        networks = Ratios.of([1.2, 1.25, 1.1, 1.2], tolerance_pct)
        assert TableCheck(good, networks, 1.0, (), True).holds is holds
    assert TableCheck(good, None, 1.0, (), True).holds


def test_the_tolerance_is_that_of_the_worst_workload(table: LatencyTable) -> None:
    assert check._network_tolerance_pct(table) == 10.0
    table.corrections[WORKLOADS[1].name] = Correction(mape=8.0)
    table.corrections["prefill_b1_t99"] = Correction()
    assert check._network_tolerance_pct(table) == 16.0


def test_entries_are_spread_over_latency(table: LatencyTable, space: SearchSpace) -> None:
    predicted = [spec.key for spec in space.sub_blocks()][::2]
    for key in predicted:
        table.entries[WORKLOADS[0].name, key] = entry(1.0, "transferred")
    chosen = sampled_entries(table, 9)
    assert [len(specs) for specs in chosen.values()] == [5, 4]
    assert not {spec.key for spec in chosen[WORKLOADS[0]]} & set(predicted)
    for workload, specs in chosen.items():
        known = sorted(
            e.latency_us
            for (name, _), e in table.entries.items()
            if name == workload.name and e.source == "measured"
        )
        latencies = [true_us(spec.key, workload) for spec in specs]
        assert latencies == sorted(latencies)
        assert (latencies[0], latencies[-1]) == (known[0], known[-1])
    assert sampled_entries(table, 1).keys() == {WORKLOADS[0]}


def test_ranks() -> None:
    assert even_ranks(5, 3) == [0, 2, 4]
    assert even_ranks(3, 24) == [0, 1, 2]
    assert even_ranks(9, 1) == [0]
    assert even_ranks(0, 4) == []


@pytest.mark.usefixtures("clock")
def test_tables_that_cannot_be_checked_are_refused(table: LatencyTable) -> None:
    with pytest.raises(UserError, match="for which search space"):
        check_table(replace(table, spaces=()))
    with pytest.raises(UserError, match="no measured sub-block"):
        check_table(replace(table, entries={}))


@pytest.mark.usefixtures("clock")
def test_networks_that_are_not_priced_are_left_out(table: LatencyTable) -> None:
    table.corrections = {WORKLOADS[1].name: Correction(mape=1.0)}
    found = check_table(table, num_entries=2, num_networks=3)
    assert found.networks is not None and found.networks.num == 3
    kept = list(table.entries)[: len(table.entries) // 2 : 9]
    table.entries = {key: table.entries[key] for key in kept}
    assert check_table(table, num_entries=2).networks is None


def test_a_quiet_machine_is_not_called_busy() -> None:
    clock = FakeClock()
    assert busy_sentence(clock, clock.call(1000.0)) == ""
    assert clock.now_ns() == pytest.approx(check.PROBE_NS, rel=0.02)


def test_one_interruption_does_not_make_a_machine_busy() -> None:
    waits = iter([4000.0])
    clock = FakeClock(disturbance=lambda: next(waits, 0.0))
    assert busy_sentence(clock, clock.call(1000.0)) == ""


def test_a_busy_machine_is_said() -> None:
    clock = FakeClock(disturbance=lambda: 1000.0)
    sentence = busy_sentence(clock, clock.call(1000.0))
    assert "other programs use the processors" in sentence
    assert "50% of a 0.2 s probe" in sentence
    assert "--realtime" in sentence


def test_waits_of_several_threads_are_at_most_all_the_time() -> None:
    clock = FakeClock()

    def call() -> None:
        clock.time_ns += 1_000_000
        clock.delay_ns += 1_900_000

    assert "during 100% of" in busy_sentence(clock, call)


@pytest.mark.usefixtures("undisturbed", "one_thread")
def test_the_probe_runs_on_a_real_backend() -> None:
    assert busy_here(get_backend("eager")) == ""
