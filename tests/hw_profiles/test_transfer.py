from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw_profiles import subnets
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.latency_table.correction import Correction, Spill
from hw_profiles.samples import Timing
from hw_profiles.transfer import TRANSFERRED, choose_networks, transfer, transferred
from hw_profiles.transfer.features import transfer_features
from hw_profiles.workload import Workload, decode, prefill
from searchspace.arch import Arch
from searchspace.cost import flops
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, MixerSpec, SubBlockSpec
from tests.hw_profiles.test_device import DEVICE

WORKLOAD = prefill(1, 64)
OTHER = replace(DEVICE, num_threads=1)
SENTINEL_US = 1000.0
CORRECTION = Correction(
    1.1, 3.0, -9.0, {"mixer gla": 0.1}, {}, (Spill(0.02, 0.2, 90.0, 0.05),), 2.0, 0.04, 12
)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace(
        name="small",
        vocab_size=64,
        d_model=(64, 32),
        head_dim=16,
        num_layers=4,
        mixers={"softmax": {}, "linear_elu": {}, "gla": {}, "none": {}},
        heads=((4, 4), (2, 1)),
        intermediate_size=(128, 64, 0),
        mixer_precision=("fp32", "int8"),
        ffn=("swiglu", "gelu"),
        ffn_precision=("fp32", "int8"),
        norm=("layernorm", "rmsnorm"),
    )


def table_of(
    latency_us: Mapping[str, float], correction: Correction, workload: Workload = WORKLOAD
) -> LatencyTable:
    entries = {
        (workload.name, key): Entry(us / SENTINEL_US, us, 0.01, 9, 1.0, True, "X", "2026-01-01")
        for key, us in latency_us.items()
    }
    return LatencyTable(DEVICE, (workload,), SENTINEL_US, entries, {workload.name: correction})


@pytest.fixture(scope="module")
def source(space: SearchSpace) -> LatencyTable:
    """A device on which every sub-block has its own rate and a fixed cost."""
    rng = np.random.default_rng(0)
    latency_us = {
        spec.key: 40.0 + flops(spec, WORKLOAD.tokens) / rng.uniform(2e4, 5e4)
        for spec in space.sub_blocks()
    }
    return table_of(latency_us, CORRECTION)


def rescaled(
    source: LatencyTable, space: SearchSpace, rng: np.random.Generator, noise: float
) -> LatencyTable:
    """Return a device that is twice as slow, each choice by another factor, and not quite so."""
    factors: dict[str, float] = {}
    latency_us = {}
    for spec in space.sub_blocks():
        log_ratio = float(np.log(2.0) + rng.normal(0.0, noise))
        for name in choices(spec):
            log_ratio += factors.setdefault(name, float(rng.normal(0.0, 0.15)))
        entry = source.entries[WORKLOAD.name, spec.key]
        latency_us[spec.key] = entry.latency_us * float(np.exp(log_ratio))
    return table_of(latency_us, source.corrections[WORKLOAD.name])


def choices(spec: SubBlockSpec) -> list[str]:
    if isinstance(spec, EndsSpec):
        return ["ends"]
    if isinstance(spec, MixerSpec):
        return [spec.mixer, f"mixer {spec.precision}", spec.norm, f"{spec.num_heads} heads"]
    return [spec.ffn, f"ffn {spec.precision}", spec.norm]


def sampled(space: SearchSpace, num: int, seed: int) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [space.decode(row) for row in space.sample_genotypes(rng, num)]


def timed(
    table: LatencyTable, archs: Sequence[Arch], rng: np.random.Generator
) -> dict[str, list[Timing]]:
    """Return timings as this device would have them, with 1.5 % noise."""
    latencies_us = [
        1e3 * table.latency_ms(arch, WORKLOAD) * float(np.exp(rng.normal(0.0, 0.015)))
        for arch in archs
    ]
    return {WORKLOAD.name: [Timing(us / 1e3, us, 0.01, 20, 1.0) for us in latencies_us]}


def mape(table: LatencyTable, truth: LatencyTable, archs: Sequence[Arch]) -> float:
    pairs = [(table.latency_ms(arch, WORKLOAD), truth.latency_ms(arch, WORKLOAD)) for arch in archs]
    return float(np.mean([abs(guess / real - 1.0) for guess, real in pairs]))


def empty_target() -> LatencyTable:
    return LatencyTable(OTHER, (WORKLOAD,), SENTINEL_US)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twenty_networks_are_enough(space: SearchSpace, source: LatencyTable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rescaled(source, space, rng, noise=0.03)
    archs = choose_networks(source, space, (WORKLOAD,), 20, seed)
    assert len({arch.id for arch in archs}) == 20
    table = transferred(source, space, empty_target(), archs, timed(truth, archs, rng))
    unseen = sampled(space, 60, 99)
    assert mape(table, truth, unseen) < 0.05

    nothing = {key: 1.0 + flops(spec, 64) for spec in space.sub_blocks() for key in [spec.key]}
    prior = table_of(nothing, Correction())
    from_nothing = transferred(prior, space, empty_target(), archs, timed(truth, archs, rng))
    assert mape(table, truth, unseen) < 0.6 * mape(from_nothing, truth, unseen)


def test_more_measurements_help_and_left_out_error_tells(
    space: SearchSpace, source: LatencyTable
) -> None:
    rng = np.random.default_rng(5)
    truth = rescaled(source, space, rng, noise=0.02)
    archs = choose_networks(source, space, (WORKLOAD,), 50)
    timings = timed(truth, archs, rng)[WORKLOAD.name]
    unseen = sampled(space, 60, 98)
    errors = []
    for num in (5, 50):
        some = {WORKLOAD.name: timings[:num]}
        table = transferred(source, space, empty_target(), archs[:num], some)
        errors.append(mape(table, truth, unseen))
    assert errors[1] < 0.5 * errors[0]
    assert table.correction(WORKLOAD).num_networks == 50
    assert 0.5 * errors[1] < table.correction(WORKLOAD).mape / 100 < 4 * errors[1]


def test_a_disturbed_network_counts_for_little(space: SearchSpace, source: LatencyTable) -> None:
    rng = np.random.default_rng(6)
    truth = rescaled(source, space, rng, noise=0.02)
    archs, unseen = choose_networks(source, space, (WORKLOAD,), 20), sampled(space, 40, 97)
    clean = timed(truth, archs, rng)[WORKLOAD.name]
    table = transferred(source, space, empty_target(), archs, {WORKLOAD.name: clean})
    bad = replace(clean[3], latency_us=3 * clean[3].latency_us)
    unnoticed, noticed = (
        transferred(
            source, space, empty_target(), archs, {WORKLOAD.name: [*clean[:3], x, *clean[4:]]}
        )
        for x in (bad, replace(bad, spread=1.0, num_samples=1))
    )
    assert mape(noticed, truth, unseen) < mape(table, truth, unseen) + 0.01
    assert mape(noticed, truth, unseen) < mape(unnoticed, truth, unseen)


def test_the_same_device_changes_nothing(space: SearchSpace, source: LatencyTable) -> None:
    archs = choose_networks(source, space, (WORKLOAD,), 12)
    exact = [1e3 * source.latency_ms(arch, WORKLOAD) for arch in archs]
    timings = {WORKLOAD.name: [Timing(us / 1e3, us, 0.0, 20, 1.0) for us in exact]}
    table = transferred(source, space, empty_target(), archs, timings)
    for arch in sampled(space, 30, 96):
        assert table.latency_ms(arch, WORKLOAD) == pytest.approx(
            source.latency_ms(arch, WORKLOAD), rel=2e-3
        )


def test_sub_blocks_alone_can_be_given(space: SearchSpace, source: LatencyTable) -> None:
    rng = np.random.default_rng(7)
    truth = rescaled(source, space, rng, noise=0.0)
    truth.corrections[WORKLOAD.name] = replace(
        source.corrections[WORKLOAD.name], per_sub_block_us=6.0, intercept_us=50.0
    )
    specs = space.sub_blocks()
    timings = []
    for spec in specs:
        us = truth.entries[WORKLOAD.name, spec.key].latency_us
        timings.append(Timing(us / 1e3, us, 0.0, 20, 1.0))
    some = [rng.permutation(len(specs))[:60]][0]
    table = transferred(
        source,
        space,
        empty_target(),
        [specs[index] for index in some],
        {WORKLOAD.name: [timings[index] for index in some]},
    )
    correction = source.corrections[WORKLOAD.name]
    for spec in specs:
        raw = source.entries[WORKLOAD.name, spec.key].latency_us
        in_network = correction.sub_block_us(spec, raw) / raw
        expected = truth.entries[WORKLOAD.name, spec.key].latency_us * in_network
        guess = table.entries[WORKLOAD.name, spec.key].latency_us
        assert guess == pytest.approx(expected, rel=0.25)


def test_entries_say_where_they_come_from(
    space: SearchSpace, source: LatencyTable, tmp_path: Path
) -> None:
    rng = np.random.default_rng(8)
    archs = choose_networks(source, space, (WORKLOAD,), 10)
    table = transferred(source, space, empty_target(), archs, timed(source, archs, rng))
    assert {key for _, key in table.entries} == {spec.key for spec in space.sub_blocks()}
    for entry in table.entries.values():
        assert entry.source == TRANSFERRED
        assert entry.num_samples == 10
        assert entry.latency_us == pytest.approx(entry.ratio * SENTINEL_US)
        assert 0.0 < entry.spread < 1.0
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").entries == table.entries


def test_features_tell_every_pair_of_operators_apart(space: SearchSpace) -> None:
    specs = space.sub_blocks()
    features = transfer_features(specs, np.full(len(specs), 50.0), WORKLOAD)
    assert features.values_SP.shape == (len(specs) + 1, len(features.names))
    assert np.isfinite(features.values_SP).all()
    kinds = [spec for spec in specs if isinstance(spec, MixerSpec)]
    assert len({row.tobytes() for row in features.values_SP[: len(kinds)]}) == len(kinds)


@pytest.mark.parametrize("num", [2, 0, -1])
def test_too_few_measurements_are_refused(
    space: SearchSpace, source: LatencyTable, num: int
) -> None:
    with pytest.raises(UserError, match=f"num_measurements={num} is too few"):
        choose_networks(source, space, (WORKLOAD,), num)


def test_what_the_source_lacks_is_named(space: SearchSpace, source: LatencyTable) -> None:
    with pytest.raises(UserError, match="no workload decode_b1_t64, only prefill_b1_t64"):
        choose_networks(source, space, (decode(1, 64),), 10)
    key = space.largest().ends.key
    entries = {name: entry for name, entry in source.entries.items() if name[1] != key}
    with pytest.raises(UserError, match=f"no entry '{key}'"):
        choose_networks(replace(source, entries=entries), space, (WORKLOAD,), 10)


def test_a_file_that_exists_is_left_alone(
    space: SearchSpace, source: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        transfer(source, space, (WORKLOAD,), path)
    assert path.read_text() == "mine"


@pytest.mark.usefixtures("undisturbed", "one_thread")
def test_a_real_table_is_transferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subnets, "SUBNET_ROUNDS", 2)
    space = SearchSpace(
        name="toy",
        vocab_size=32,
        d_model=(16,),
        head_dim=8,
        num_layers=2,
        mixers={"softmax": {}, "none": {}},
        heads=((2, 1),),
        intermediate_size=(32, 16),
        ffn=("gelu",),
    )
    workloads, seen = (prefill(1, 12), decode(2, 12)), []
    latency_us = {spec.key: 5e4 for spec in space.sub_blocks()}
    first, second = (table_of(latency_us, Correction(), workload) for workload in workloads)
    source = replace(first, workloads=workloads, entries={**first.entries, **second.entries})
    path = tmp_path / "new" / "target.json"
    table = transfer(
        source,
        space,
        workloads,
        path,
        num_measurements=4,
        num_threads=1,
        progress=lambda done, text: seen.append(done),
    )
    assert seen[-1] == 1.0
    read = LatencyTable.load(path)
    assert read.entries == table.entries
    assert read.device.num_threads == 1
    assert read.spaces == (space,)
    for workload in workloads:
        assert read.correction(workload).num_networks == 4
        for arch in sampled(space, 8, 0):
            assert 0 < read.latency_ms(arch, workload) < 0.5 * source.latency_ms(arch, workload)
            low_ms, high_ms = read.interval_ms(arch, workload)
            assert low_ms < read.latency_ms(arch, workload) < high_ms
