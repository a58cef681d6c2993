from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hw_profiles import profiler, subnets, timing
from hw_profiles.backends import Call
from hw_profiles.backends.eager import runner
from hw_profiles.latency_table import MEASURED, PRIOR, LatencyTable
from hw_profiles.profiler import calibration, filling, profile
from hw_profiles.profiler.calibration import calibration_archs, raw_sum_us
from hw_profiles.profiler.planning import by_information, without_inner_widths
from hw_profiles.samples import Timing, TooBusyError
from hw_profiles.subnets import measure_subnets
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.workload import decode, prefill
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec
from searchspace.subnet import Subnet

WORKLOADS = (prefill(1, 12), decode(2, 12))
pytestmark = pytest.mark.usefixtures("undisturbed", "one_thread")


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace(
        name="toy",
        vocab_size=32,
        d_model=(16,),
        head_dim=8,
        num_layers=2,
        mixers={"softmax": {}, "gla": {}, "none": {}},
        heads=((2, 1),),
        intermediate_size=(64, 48, 32, 16),
        mixer_precision=("fp32", "int8"),
        ffn=("gelu",),
    )


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "ROUNDS", 4)
    monkeypatch.setattr(filling, "PASS_ROUNDS", 2)
    monkeypatch.setattr(filling, "CHUNK", 4)
    monkeypatch.setattr(filling, "SAMPLE_MS", 0.05)
    monkeypatch.setattr(calibration, "DEFAULT_NETWORKS", 24)
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    monkeypatch.setattr(subnets, "SUBNET_ROUNDS", 2)


def test_every_reachable_sub_block_is_measured(space: SearchSpace, tmp_path: Path) -> None:
    path, seen = tmp_path / "table.json", []
    table = profile(space, WORKLOADS, path, progress=lambda done, text: seen.append(done))
    keys = {(item.name, spec.key) for item in WORKLOADS for spec in space.sub_blocks()}
    assert set(table.entries) == keys
    for entry in table.entries.values():
        assert 0 < entry.latency_us < math.inf
        assert entry.num_samples >= 4
    names = {key: entry.implementation for (_, key), entry in table.entries.items()}
    assert names[space.largest().sub_blocks()[0].key] == "SoftmaxAttention"
    assert names[space.largest().ends.key] == "Ends"
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    for workload in WORKLOADS:
        fit = table.correction(workload)
        assert fit.num_networks == 24
        assert math.isfinite(fit.mape)
        assert table.latency_ms(space.largest(), workload) > 0
    assert LatencyTable.load(path).entries == table.entries


def test_a_finished_table_is_not_measured_again(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    first = profile(space, WORKLOADS, path)
    text = path.read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(filling, "time_interleaved", never)
    monkeypatch.setattr(profiler, "calibrate", never)
    again = profile(space, WORKLOADS, path)
    assert again.entries == first.entries
    assert path.read_text() == text


def test_an_interrupted_profile_goes_on(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def interrupt(done: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(space, WORKLOADS, path, progress=interrupt)
    partial = LatencyTable.load(path)
    assert len(partial.entries) == filling.CHUNK * len(WORKLOADS)
    assert not partial.corrections
    table = profile(space, WORKLOADS, path)
    assert len(table.entries) == len(space.sub_blocks()) * len(WORKLOADS)
    for name, entry in partial.entries.items():
        assert table.entries[name].num_samples > entry.num_samples
    assert table.sentinel_us == partial.sentinel_us


def test_another_workload_is_added_to_a_table(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first = profile(space, WORKLOADS[:1], path)
    both = profile(space, WORKLOADS[1:], path)
    assert both.workloads == WORKLOADS
    assert first.entries.items() <= both.entries.items()
    assert set(both.corrections) == {item.name for item in WORKLOADS}
    assert both.correction(WORKLOADS[0]) == first.correction(WORKLOADS[0])


def test_a_table_of_another_device_is_refused_untouched(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = profile(space, WORKLOADS[:1], path)
    table.device = replace(table.device, cpu="Another processor")
    table.save(path)
    text = path.read_text()
    with pytest.raises(UserError, match=r"Another processor.*nas profile"):
        profile(space, WORKLOADS, path)
    assert path.read_text() == text


def test_too_short_a_budget_uses_a_prior_and_says_so(
    space: SearchSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, specs = tmp_path / "t.json", space.sub_blocks()
    with caplog.at_level("WARNING"):
        table = profile(space, WORKLOADS[:1], path, time_budget_s=1e-6)
    assert "calibrated roofline" in caplog.text
    measured = [spec for spec in specs if table.entry(WORKLOADS[0], spec.key).source == MEASURED]
    assert measured == [s for s in specs if s in by_information(space, specs, 0)[: filling.CHUNK]]
    genotypes = space.sample_genotypes(np.random.default_rng(0), 20)
    assert all(table.latency_ms(space.decode(row), WORKLOADS[0]) > 0 for row in genotypes)
    first = {key: table.entry(WORKLOADS[0], key) for _, key in table.entries}
    again = profile(space, WORKLOADS[:1], path)
    assert all(entry.source == MEASURED for entry in again.entries.values())
    guesses = [
        first[key].latency_us / again.entry(WORKLOADS[0], key).latency_us
        for key, entry in first.items()
        if entry.source == PRIOR
    ]
    assert guesses
    assert all(1 / 5 < guess < 5 for guess in guesses)


def test_the_most_frequent_come_first_and_inner_widths_last(space: SearchSpace) -> None:
    specs = space.sub_blocks()
    ordered = by_information(space, specs, 0)
    assert sorted(ordered, key=specs.index) == specs
    assert ordered[0] == space.largest().ends
    inner = [spec not in without_inner_widths(specs) for spec in ordered]
    assert inner == sorted(inner)


def test_disturbed_samples_are_refused(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(targets: Mapping[str, Call], **arguments: Any) -> dict[str, Timing]:
        timings = timing.time_interleaved(targets, **arguments)
        return {name: replace(value, reliable=False) for name, value in timings.items()}

    monkeypatch.setattr(filling, "time_interleaved", disturbed)
    with pytest.raises(TooBusyError, match="too busy"):
        profile(space, WORKLOADS[:1], tmp_path / "t.json")
    assert not LatencyTable.load(tmp_path / "t.json").entries


def test_a_busy_machine_is_said(
    space: SearchSpace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiler, "TOLERATED_MAPE", math.inf)
    with caplog.at_level("WARNING"):
        profile(space, WORKLOADS[:1], tmp_path / "quiet.json")
    assert "busy" not in caplog.text
    monkeypatch.setattr(profiler, "TOLERATED_MAPE", 0.0)
    with caplog.at_level("WARNING"):
        profile(space, WORKLOADS[:1], tmp_path / "busy.json")
    assert "prefill_b1_t12" in caplog.text
    assert "the machine was busy" in caplog.text


def test_widths_that_are_kept(space: SearchSpace) -> None:
    kept = [
        s.intermediate_size
        for s in without_inner_widths(space.sub_blocks())
        if isinstance(s, FFNSpec)
    ]
    assert kept == [64, 48, 16]


def test_widths_are_kept_for_every_placement() -> None:
    widths = {"pre": (128, 96, 64, 32, 16), "post": (80, 48), "peri": (72, 56, 40, 24)}
    specs = [
        FFNSpec(16, "gelu", width, placement=placement)
        for placement, some in widths.items()
        for width in some
    ]
    kept = [(s.placement, s.intermediate_size) for s in without_inner_widths(specs)]  # type: ignore[union-attr]
    assert kept == [
        *(("pre", width) for width in (128, 64, 16)),
        *(("post", width) for width in (80, 48)),
        *(("peri", width) for width in (72, 56, 24)),
    ]


def test_calibration_networks_are_spread(space: SearchSpace, tmp_path: Path) -> None:
    table = profile(space, WORKLOADS[:1], tmp_path / "t.json")
    archs = calibration_archs(table, space, WORKLOADS[:1], 0, 24)
    assert len({arch.id for arch in archs}) == len(archs) == 24
    sums = [raw_sum_us(table, arch, WORKLOADS[0]) for arch in archs]
    num = 24 * calibration.POOL_PER_NETWORK
    rows = space.sample_genotypes(np.random.default_rng(0), num)
    pool = [raw_sum_us(table, space.decode(row), WORKLOADS[0]) for row in rows]
    assert (min(sums), max(sums)) == (min(pool), max(pool))


def test_more_time_buys_more_networks(space: SearchSpace, tmp_path: Path) -> None:
    table = profile(space, WORKLOADS[:1], tmp_path / "t.json")
    numbers = [
        calibration.num_networks(table, space, WORKLOADS[:1], 0, seconds)
        for seconds in (0.0, 4.0, 8.0, 1e6)
    ]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (calibration.MIN_NETWORKS, calibration.MAX_NETWORKS)


def test_whole_networks_are_timed(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    archs = {"large": space.largest(), "small": space.smallest()}
    networks = {n: Subnet(a).reset(generator).pack().eval() for n, a in archs.items()}
    timings = measure_subnets(networks, WORKLOADS, reference_us=500.0)
    assert set(timings) == {"large", "small"}
    for by_workload in timings.values():
        assert set(by_workload) == {item.name for item in WORKLOADS}
        for value in by_workload.values():
            assert value.latency_us == pytest.approx(500.0 * value.ratio)


def test_runs_repeat_from_the_same_state(space: SearchSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for spec in space.sub_blocks():
            block = build_for_timing(spec, generator)
            assert not any(
                child.weight.dtype == torch.float32
                for child in block.modules()
                if getattr(child, "precision", "fp32") == "int8"
            )
            for workload in WORKLOADS:
                inputs = sub_block_inputs(spec, workload, generator)
                assert inputs.shape[:2] == (workload.batch, workload.new_tokens)
                run = runner(block, inputs, workload)
                shapes = {tuple(run().shape) for _ in range(4)}
                assert len(shapes) == 1


def test_decode_step_sees_its_whole_context(space: SearchSpace) -> None:
    workload = decode(1, 20)
    network = Subnet(space.uniform(mixer="softmax")).reset(torch.Generator().manual_seed(0)).eval()
    states: list[object] = []
    original = network.init_state

    def remember(batch: int, max_tokens: int) -> object:
        states.append(original(batch, max_tokens))
        return states[-1]

    network.init_state = remember  # type: ignore[assignment,method-assign]
    with torch.inference_mode():
        run = runner(network, torch.zeros(1, 1, dtype=torch.long), workload)
        for _ in range(3):
            run()
            lengths = {part.length for part in states[0] if part is not None}  # type: ignore[attr-defined]
            assert lengths == {21}


def test_table_files_hold_plain_json(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    profile(space, WORKLOADS[:1], path)
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["workloads"] == ["prefill_b1_t12"]
    assert values["device_id"] == LatencyTable.load(path).device.id
