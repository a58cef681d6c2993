from __future__ import annotations

import gc
import math
import os
import random
import statistics
from collections.abc import Callable

import pytest
import torch

from hw_profiles import timing
from hw_profiles.clock import SystemClock, realtime_scheduling
from hw_profiles.samples import Sample, Timing, TooBusyError, summarise
from hw_profiles.timing import MIN_ROUNDS, Sentinel, time_interleaved
from tests.hw_profiles.conftest import FakeClock

DURATIONS_US = {"tiny": 20.0, "small": 150.0, "middle": 800.0, "large": 3000.0}
SENTINEL_US = 1000.0


def measure(clock: FakeClock, rng: random.Random, **options: object) -> dict[str, Timing]:
    targets = {name: clock.call(duration) for name, duration in DURATIONS_US.items()}
    sentinel = Sentinel(clock.call(SENTINEL_US), SENTINEL_US)
    defaults: dict[str, object] = {"rounds": 20}
    return time_interleaved(
        targets, rng=rng, sentinel=sentinel, clock=clock, **{**defaults, **options}
    )


def test_steady_clock_gives_exact_latencies(rng: random.Random) -> None:
    for name, result in measure(FakeClock(), rng).items():
        assert result.latency_us == pytest.approx(DURATIONS_US[name])
        assert result.ratio == pytest.approx(DURATIONS_US[name] / SENTINEL_US)
        assert result.spread == pytest.approx(0.0, abs=1e-9)
        assert result.kept_fraction == 1.0
        assert result.reliable


def test_drift_of_two_times_cancels(rng: random.Random) -> None:
    def speed(seconds: float) -> float:
        return 1.5 + 0.5 * math.sin(2 * math.pi * seconds / 0.7)

    clock = FakeClock(speed)
    for name, result in measure(clock, rng, rounds=40).items():
        assert result.latency_us == pytest.approx(DURATIONS_US[name], rel=0.04)


def test_disturbed_samples_are_dropped(rng: random.Random) -> None:
    noise = random.Random(1)
    clock = FakeClock(disturbance=lambda: 4000.0 if noise.random() < 0.005 else 0.0)
    for name, result in measure(clock, rng, rounds=30).items():
        assert result.latency_us == pytest.approx(DURATIONS_US[name])
        assert result.reliable
        assert name != "tiny" or result.kept_fraction < 1.0


def test_always_disturbed_samples_are_used_but_marked(rng: random.Random) -> None:
    noise = random.Random(2)
    clock = FakeClock(disturbance=lambda: 200.0 * (1 + noise.random()))
    results = measure(clock, rng, rounds=8)
    assert not any(result.reliable for result in results.values())
    assert all(result.kept_fraction == 0.0 for result in results.values())
    assert results["large"].latency_us == pytest.approx(DURATIONS_US["large"], rel=0.3)


def test_rounds_are_added_when_too_few_samples_are_left(rng: random.Random) -> None:
    calls = {"count": 0}

    def at_first() -> float:
        calls["count"] += 1
        return 5000.0 if calls["count"] < 150 else 0.0

    results = measure(FakeClock(disturbance=at_first), rng, rounds=10)
    assert all(result.num_samples >= 3 for result in results.values())
    assert results["middle"].latency_us == pytest.approx(DURATIONS_US["middle"])


def test_waiting_all_the_time_is_marked(rng: random.Random) -> None:
    results = measure(FakeClock(disturbance=lambda: 1e6), rng, rounds=3)
    assert not any(result.reliable for result in results.values())


def test_no_round_with_a_sentinel_is_refused() -> None:
    with pytest.raises(TooBusyError, match="too busy"):
        summarise([Sample(0, 1.0, 0.0)], [Sample(1, 1.0, 0.0)], 1.0)


def test_every_round_samples_every_target_once_in_changing_order(rng: random.Random) -> None:
    clock, log = FakeClock(), []

    def logged(name: str, duration_us: float) -> Callable[[], None]:
        run = clock.call(duration_us)
        return lambda: (log.append(name), run())[1]

    names = list("abcdef")
    targets = {name: logged(name, 1000.0) for name in names}
    sentinel = Sentinel(logged("s", SENTINEL_US), SENTINEL_US)
    time_interleaved(targets, rounds=MIN_ROUNDS, rng=rng, sentinel=sentinel, clock=clock)
    start = 1 + 3 * (len(names) + 1)  # one sentinel call, then three of each to warm up
    bursts = [name for position, name in enumerate(log[start:]) if position % 2]
    rounds = "".join(bursts).split("ss")
    orders = [text.replace("s", "") for text in rounds]
    assert len(orders) == MIN_ROUNDS
    assert all(sorted(order) == names for order in orders)
    assert len(set(orders)) > 1
    assert all("s" in text.strip("s") for text in rounds)


def test_samples_are_as_long_as_asked(rng: random.Random) -> None:
    calls = {"n": 0}
    clock = FakeClock()
    run = clock.call(10.0)

    def counted() -> None:
        calls["n"] += 1
        run()

    sentinel = Sentinel(clock.call(SENTINEL_US), SENTINEL_US)
    time_interleaved(
        {"x": counted}, rounds=MIN_ROUNDS, rng=rng, sentinel=sentinel, clock=clock,
        min_sample_ms=2.0,
    )  # fmt: skip
    warm_ups = 3 + 2 * MIN_ROUNDS
    assert calls["n"] == warm_ups + 200 * MIN_ROUNDS


def test_time_budget_ends_early_but_not_before_the_least(rng: random.Random) -> None:
    full = FakeClock()
    measure(full, rng, rounds=200)
    some = FakeClock()
    results = measure(some, rng, rounds=200, time_budget_s=full.time_ns / 2e9)
    assert some.time_ns < 0.6 * full.time_ns
    assert all(MIN_ROUNDS < result.num_samples < 200 for result in results.values())
    least = measure(FakeClock(), rng, rounds=200, time_budget_s=0.0)
    assert all(result.num_samples == MIN_ROUNDS for result in least.values())


def test_target_error_ends_early(rng: random.Random) -> None:
    exact = measure(FakeClock(), rng, rounds=200, target_error=0.01)
    assert exact["small"].num_samples == MIN_ROUNDS
    noise = random.Random(3)
    noisy = FakeClock(speed=lambda seconds: noise.uniform(0.9, 1.1))
    results = measure(noisy, rng, rounds=2000, target_error=0.01)
    assert all(MIN_ROUNDS < result.num_samples < 1000 for result in results.values())
    for name, result in results.items():
        assert result.latency_us == pytest.approx(DURATIONS_US[name], rel=0.05)


def test_summary_equals_slow_reference() -> None:
    noise = random.Random(4)
    samples = [Sample(i // 2, noise.uniform(90, 110), noise.choice([0, 0, 0.1])) for i in range(60)]
    sentinels = [Sample(i // 3, noise.uniform(9, 11), 0.0) for i in range(90)]
    ratios = []
    for index in range(30):
        mine = [s.call_us for s in samples if s.stretch == index and s.delay_share <= 0.005]
        theirs = [s.call_us for s in sentinels if s.stretch == index]
        if mine:
            ratios.append(statistics.median(mine) / statistics.median(theirs))
    result = summarise(samples, sentinels, 1000.0)
    middle = statistics.median(ratios)
    assert result.ratio == pytest.approx(middle)
    assert result.latency_us == pytest.approx(1000.0 * middle)
    spread = statistics.median(abs(ratio - middle) for ratio in ratios) / middle
    assert result.spread == pytest.approx(spread)
    assert result.num_samples == len(ratios)
    assert result.kept_fraction == sum(s.delay_share == 0 for s in samples) / 60


def test_reference_is_a_low_quantile_of_undisturbed_samples() -> None:
    noise = random.Random(5)
    clock = FakeClock(
        speed=lambda seconds: noise.uniform(1.0, 1.5),
        disturbance=lambda: 9000.0 if noise.random() < 0.3 else 0.0,
    )
    assert 100.0 < Sentinel.measured(clock.call(100.0), clock).reference_us < 115.0


def test_garbage_collection_is_off_inside_and_on_again_after(rng: random.Random) -> None:
    clock, seen = FakeClock(), []
    run = clock.call(1000.0)
    target = {
        "x": lambda: (seen.append((gc.isenabled(), torch.is_inference_mode_enabled())), run())
    }
    sentinel = Sentinel(clock.call(SENTINEL_US), SENTINEL_US)
    time_interleaved(target, rounds=5, rng=rng, sentinel=sentinel, clock=clock)
    assert set(seen) == {(False, True)}
    assert gc.isenabled()


def test_no_targets_need_no_time(rng: random.Random) -> None:
    sentinel = Sentinel(lambda: None, 1.0)
    assert time_interleaved({}, rounds=5, rng=rng, sentinel=sentinel, clock=FakeClock()) == {}


def test_realtime_rests_as_long_as_it_runs(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    monkeypatch.setattr(timing, "realtime_scheduling", lambda on: contextlib.nullcontext())
    clock = FakeClock()
    measure(clock, rng, realtime=True)
    assert clock.slept_s == pytest.approx(clock.time_ns / 1e9 / 2, rel=0.05)


def test_realtime_scheduling_is_undone() -> None:
    if not hasattr(os, "sched_getscheduler"):
        pytest.skip("needs Linux")
    before = os.sched_getscheduler(0)
    try:
        with realtime_scheduling(True):
            assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    except ValueError as error:
        assert "not allowed" in str(error)
    assert os.sched_getscheduler(0) == before


def test_system_clock_counts_up_and_survives_ended_threads() -> None:
    import threading

    hold = threading.Event()
    thread = threading.Thread(target=hold.wait)
    thread.start()
    clock = SystemClock()
    before = clock.run_delay_ns()
    hold.set()
    thread.join()
    start = clock.now_ns()
    assert clock.run_delay_ns() >= 0
    assert before >= 0
    assert clock.now_ns() >= start
    clock.close()
    assert clock.run_delay_ns() >= 0
