from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hw_profiles.latency_table import INTERPOLATED, PRIOR, Entry, LatencyTable
from hw_profiles.latency_table.correction import Correction, Spill, traits, working_set_bytes
from hw_profiles.workload import Workload, decode, prefill
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec
from tests.hw_profiles.test_device import DEVICE

WORKLOADS = (prefill(1, 16), decode(1, 16))
FITS = {
    WORKLOADS[0].name: Correction(
        scale=1.25,
        per_sub_block_us=7.0,
        intercept_us=40.0,
        scales={"mixer softmax": 0.1, "int8": -0.05},
        once_us={"mixer gla": 21.0, "ends": 4.0, "rope": -9.0, "absent": 1.0},
        spills=(Spill(0.01, 0.05, 300.0, 0.2), Spill(0.05, 0.5, -40.0, 0.0)),
        mape=2.5,
        error_90=0.06,
        num_networks=14,
        arch_ids=("a", "b"),
    ),
    WORKLOADS[1].name: Correction(scale=0.9, per_sub_block_us=-1.0, intercept_us=-12.0),
}


def entry(latency_us: float) -> Entry:
    return Entry(latency_us / 1000.0, latency_us, 0.01, 12, 0.9, True, "X", "2026-01-01T00:00:00")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", 64)


@pytest.fixture
def table(space: SearchSpace) -> LatencyTable:
    rng = np.random.default_rng(0)
    entries = {
        (workload.name, spec.key): entry(float(rng.uniform(20, 900)))
        for workload in WORKLOADS
        for spec in space.sub_blocks()
    }
    return LatencyTable(DEVICE, WORKLOADS, 1000.0, entries, dict(FITS))


def archs(space: SearchSpace, num: int) -> list[Arch]:
    rng = np.random.default_rng(1)
    return [space.decode(row) for row in space.sample_genotypes(rng, num)]


def test_latency_is_the_corrected_sum(space: SearchSpace, table: LatencyTable) -> None:
    for arch in archs(space, 20):
        for workload in WORKLOADS:
            fit, total_us = FITS[workload.name], FITS[workload.name].intercept_us
            sum_us, mib = 0.0, 0.0
            present = {trait for spec in arch.sub_blocks() for trait in traits(spec)}
            total_us += sum(us for trait, us in fit.once_us.items() if trait in present)
            for spec in arch.sub_blocks():
                measured = table.entries[workload.name, spec.key].latency_us
                scale = fit.scale + sum(fit.scales.get(trait, 0.0) for trait in traits(spec))
                total_us += scale * measured + fit.per_sub_block_us
                sum_us += measured
                mib += working_set_bytes(spec, workload) / 2**20
            for spill in fit.spills:
                share = (mib - spill.begin_mib) / (spill.end_mib - spill.begin_mib)
                price = spill.us_per_mib * mib + spill.scale * sum_us
                total_us += min(max(share, 0.0), 1.0) * price
            assert table.latency_ms(arch, workload) == pytest.approx(total_us / 1e3)


def test_breakdown_names_every_part(space: SearchSpace, table: LatencyTable) -> None:
    arch = space.largest()
    parts = table.breakdown(arch, WORKLOADS[0])
    assert [name for name, _ in parts[:-1]] == [spec.key for spec in arch.sub_blocks()]
    assert parts[-1][0] == "whole network"
    assert parts[-1][1] > 0.04
    assert sum(ms for _, ms in parts) == pytest.approx(table.latency_ms(arch, WORKLOADS[0]))


def test_vectorised_prices_equal_single_ones(space: SearchSpace, table: LatencyTable) -> None:
    for workload in WORKLOADS:
        costs = table.costs_ms(space, workload)
        genotypes = space.sample_genotypes(np.random.default_rng(2), 100)
        single = [table.latency_ms(space.decode(row), workload) for row in genotypes]
        np.testing.assert_allclose(costs.of(genotypes), single)


def test_a_matrix_is_priced_by_the_table_itself(space: SearchSpace, table: LatencyTable) -> None:
    genotypes = space.sample_genotypes(np.random.default_rng(2), 30)
    expected = table.costs_ms(space, WORKLOADS[0]).of(genotypes)
    with pytest.raises(UserError, match="space"):
        table.latency_ms(genotypes, WORKLOADS[0])
    np.testing.assert_array_equal(table.latency_ms(genotypes, WORKLOADS[0], space), expected)
    table.spaces = (space,)
    np.testing.assert_array_equal(table.latency_ms(genotypes, WORKLOADS[0]), expected)


def test_the_interval_is_around_the_latency(space: SearchSpace, table: LatencyTable) -> None:
    arch = space.largest()
    low, high = table.interval_ms(arch, WORKLOADS[0])
    latency = table.latency_ms(arch, WORKLOADS[0])
    assert (low, high) == pytest.approx((latency / 1.06, latency * 1.06))
    with pytest.raises(UserError, match="nas profile"):
        table.interval_ms(arch, WORKLOADS[1])


def test_without_correction_the_sum_is_plain(space: SearchSpace, table: LatencyTable) -> None:
    table.corrections.clear()
    arch = space.smallest()
    total = sum(table.entries[WORKLOADS[0].name, spec.key].latency_us for spec in arch.sub_blocks())
    assert table.latency_ms(arch, WORKLOADS[0]) == pytest.approx(total / 1e3)


def test_missing_entry_is_named(space: SearchSpace, table: LatencyTable) -> None:
    arch = space.largest()
    missing = arch.sub_blocks()[0].key
    del table.entries[WORKLOADS[0].name, missing]
    with pytest.raises(UserError) as caught:
        table.latency_ms(arch, WORKLOADS[0])
    for part in (missing, WORKLOADS[0].name, "nas profile"):
        assert part in str(caught.value)
    assert table.latency_ms(arch, WORKLOADS[1]) > 0
    with pytest.raises(UserError, match="prefill_b3_t9"):
        table.latency_ms(arch, prefill(3, 9))


def ffn_key(width: int, **changes: str) -> str:
    ffn, norm = changes.get("ffn", "gelu"), changes.get("norm", "rmsnorm")
    return FFNSpec(32, ffn, width, "fp32", norm, changes.get("placement", "pre")).key


def test_interpolation_is_linear_between_the_nearest_widths() -> None:
    name = WORKLOADS[0].name
    measured = {64: 100.0, 128: 160.0, 512: 400.0}
    entries = {(name, ffn_key(width)): entry(us) for width, us in measured.items()}
    entries[name, ffn_key(256, ffn="relu2")] = entry(1.0)
    entries[name, ffn_key(256, norm="layernorm")] = entry(1.0)
    entries[name, ffn_key(256, placement="post")] = entry(1.0)
    entries[WORKLOADS[1].name, ffn_key(256)] = entry(1.0)
    table = LatencyTable(DEVICE, WORKLOADS, 1000.0, entries)
    for width in (96, 192, 256, 320):
        found = table.entry(WORKLOADS[0], ffn_key(width))
        expected = np.interp(width, list(measured), list(measured.values()))
        assert found.latency_us == pytest.approx(expected)
        assert found.source == INTERPOLATED
    assert table.entry(WORKLOADS[0], ffn_key(128)).latency_us == 160.0
    for outside in (32, 1024):
        with pytest.raises(UserError, match=f"f{outside}/"):
            table.entry(WORKLOADS[0], ffn_key(outside))
    table.enter(WORKLOADS[0], ffn_key(1024), Entry.predicted(9.0, 1000.0))
    assert table.entry(WORKLOADS[0], ffn_key(1024)).source == PRIOR
    with pytest.raises(UserError, match="f768/"):
        table.entry(WORKLOADS[0], ffn_key(768))
    table.enter(WORKLOADS[0], ffn_key(256), Entry.predicted(9.0, 1000.0))
    assert table.entry(WORKLOADS[0], ffn_key(256)).source == INTERPOLATED
    table.enter(WORKLOADS[0], ffn_key(1024), entry(800.0))
    assert table.entry(WORKLOADS[0], ffn_key(768)).latency_us == pytest.approx(600.0)


def test_interpolation_keeps_placements_apart() -> None:
    name = WORKLOADS[0].name
    factors = {"pre": 1.0, "post": 3.0, "peri": 10.0}
    entries = {
        (name, ffn_key(width, placement=placement)): entry(factor * width)
        for placement, factor in factors.items()
        for width in (64, 128, 512)
    }
    table = LatencyTable(DEVICE, WORKLOADS, 1000.0, entries)
    for placement, factor in factors.items():
        found = table.entry(WORKLOADS[0], ffn_key(320, placement=placement))
        assert found.latency_us == pytest.approx(factor * 320)
        del table.entries[name, ffn_key(512, placement=placement)]
        with pytest.raises(UserError, match="f320/"):
            table.entry(WORKLOADS[0], ffn_key(320, placement=placement))


def test_file_round_trip(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "table.json"
    table.save(path)
    again = LatencyTable.load(path)
    assert again.device == table.device
    assert again.workloads == table.workloads
    assert again.sentinel_us == table.sentinel_us
    assert again.entries == table.entries
    assert again.corrections[WORKLOADS[0].name] == FITS[WORKLOADS[0].name]
    assert math.isnan(again.corrections[WORKLOADS[1].name].mape)
    assert [item.name for item in path.parent.iterdir()] == ["table.json"]
    again.save(path)
    assert LatencyTable.load(path).entries == table.entries


def test_absent_truncated_and_foreign_files_are_refused(
    table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(UserError, match="no latency table"):
        LatencyTable.load(path)
    table.save(path)
    text = path.read_text()
    for content in (text[: len(text) // 2], "", "[1, 2]", '{"a": 1}', "\x00\x01"):
        path.write_text(content)
        with pytest.raises(UserError, match=str(path)):
            LatencyTable.load(path)


DAMAGE = {
    "version": 99,
    "sentinel_us": -1.0,
    "workloads": ["prefill"],
    "device": {"cpu": "x"},
    "entries": {"prefill_b1_t16": {"k": {"ratio": 1.0}}},
    "corrections": {"prefill_b1_t16": {"scale": "2", "mape": None, "spills": []}},
}


@pytest.mark.parametrize("field", DAMAGE)
def test_damaged_fields_are_refused(field: str, table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, field: DAMAGE[field]}))
    with pytest.raises(UserError, match=r"table\.json"):
        LatencyTable.load(path)
    path.write_text(json.dumps({key: value for key, value in values.items() if key != field}))
    with pytest.raises(UserError, match=r"table\.json"):
        LatencyTable.load(path)


@pytest.mark.parametrize("wrong", [0.0, -3.0, math.nan, math.inf, "7"])
def test_entries_must_be_positive_numbers(
    wrong: object, table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    values = json.loads(path.read_text())
    next(iter(values["entries"][WORKLOADS[0].name].values()))["latency_us"] = wrong
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="latency_us"):
        LatencyTable.load(path)


def test_workloads_of_a_table_are_told_apart(table: LatencyTable, space: SearchSpace) -> None:
    arch = space.largest()
    values = {item: table.latency_ms(arch, item) for item in WORKLOADS}
    assert len(set(values.values())) == 2
    assert isinstance(Workload.parse("prefill_b1_t16"), Workload)
