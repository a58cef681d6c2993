from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hw_profiles.correction import fit_correction, left_out_error
from hw_profiles.latency_table import INTERPOLATED, Correction, Entry, LatencyTable
from hw_profiles.workload import Workload, decode, prefill
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec
from searchspace.subnet import Subnet
from tests.hw_profiles.test_device import DEVICE

WORKLOADS = (prefill(1, 16), decode(1, 16))
FITS = {
    WORKLOADS[0].name: Correction(1.25, 7.0, 300.0, 0.05, 40.0, 2.5, 14),
    WORKLOADS[1].name: Correction(0.9, -1.0, 0.0, 0.0, -12.0, math.nan, 14),
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
            for spec in arch.sub_blocks():
                measured = table.entries[workload.name, spec.key].latency_us
                total_us += fit.scale * measured + fit.per_sub_block_us
            spilled_mib = Subnet(arch).weight_bytes() / 2**20 - fit.cache_mib
            total_us += fit.us_per_spilled_mib * max(spilled_mib, 0.0)
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
    table.entries[name, ffn_key(1024)] = entry(800.0)
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
    "corrections": {"prefill_b1_t16": {"scale": "2", "mape": None}},
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


def networks(num: int, noise: float = 0.0) -> tuple[np.ndarray, ...]:
    """Return the sums, counts, weight bytes and noise factors of random networks."""
    rng = np.random.default_rng(3)
    counts = rng.integers(2, 13, num).astype(float)
    sums = counts * rng.uniform(100, 900, num)
    weights = counts * rng.uniform(1e4, 1e6, num)
    return sums, counts, weights, 1 + noise * rng.standard_normal(num)


TRUTHS = [
    (0.8, 0.0, 0.0, 0.0, 0.0),
    (1.2, 30.0, 0.0, 0.0, 0.0),
    (0.9, 12.0, 0.0, 0.0, 400.0),
    (1.1, 0.0, 0.0, 0.0, -50.0),
    (1.1, 0.0, 200.0, 2.0, 0.0),
    (1.1, 0.0, 200.0, 3.0, -30.0),
]


@pytest.mark.parametrize("truth", TRUTHS)
def test_fit_recovers_what_made_the_latencies(truth: tuple[float, ...]) -> None:
    sums, counts, weights, _ = networks(20)
    scale, constant, per_spilled, cache_mib, intercept = truth
    spilled_mib = np.maximum(weights / 2**20 - cache_mib, 0.0)
    measured = scale * sums + constant * counts + per_spilled * spilled_mib + intercept
    fit = fit_correction(sums, counts, weights, measured, 40.0)
    found = (fit.scale, fit.per_sub_block_us, fit.us_per_spilled_mib, fit.cache_mib)
    np.testing.assert_allclose((*found, fit.intercept_us), truth, rtol=1e-6, atol=1e-4)
    assert fit.mape < 1e-6
    assert fit.num_networks == 20


def test_noise_does_not_buy_more_terms() -> None:
    sums, counts, weights, noise = networks(16, 0.03)
    fit = fit_correction(sums, counts, weights, sums * noise, 40.0)
    assert (fit.per_sub_block_us, fit.us_per_spilled_mib, fit.intercept_us) == (0.0, 0.0, 0.0)
    assert fit.scale == pytest.approx(1.0, abs=0.03)
    assert 1.0 < fit.mape < 5.0


def test_nothing_is_priced_below_zero() -> None:
    sums, counts, weights, _ = networks(16)
    measured = 1.3 * sums - 60.0 * counts
    assert fit_correction(sums, counts, weights, measured, 90.0).per_sub_block_us < 0
    fit = fit_correction(sums, counts, weights, measured, 40.0)
    assert fit.scale * 40.0 + fit.per_sub_block_us > 0
    measured = sums - 0.8 * sums.min()
    fit = fit_correction(sums, counts, weights, measured, 40.0)
    assert fit.scale * sums.min() + fit.intercept_us > 0.4 * sums.min()


def test_few_networks_only_fit_a_scale() -> None:
    fit = fit_correction([100.0, 200.0], [2, 3], [1e5, 1e5], [110.0, 220.0], 10.0)
    assert (fit.scale, fit.per_sub_block_us) == (1.0, 0.0)
    sums, counts, weights, _ = networks(5)
    fit = fit_correction(sums, counts, weights, 2 * sums + 9 * counts, 10.0)
    assert (fit.per_sub_block_us, fit.intercept_us) == (0.0, 0.0)
    assert fit.scale > 2.0


def test_left_out_error_equals_explicit_refits() -> None:
    sums, counts, _, noise = networks(9, 0.05)
    measured = (sums + 20 * counts) * noise
    columns = np.stack([sums, counts], axis=1)
    errors = []
    for row in range(9):
        x, y = np.delete(columns, row, 0), np.delete(measured, row)
        gram = (x / y[:, None]).T @ (x / y[:, None])
        weights = np.linalg.solve(gram, (x / y[:, None]).sum(axis=0))
        errors.append(abs(columns[row] @ weights / measured[row] - 1))
    assert left_out_error(columns, measured) == pytest.approx(100 * np.mean(errors))


def test_workloads_of_a_table_are_told_apart(table: LatencyTable, space: SearchSpace) -> None:
    arch = space.largest()
    values = {item: table.latency_ms(arch, item) for item in WORKLOADS}
    assert len(set(values.values())) == 2
    assert isinstance(Workload.parse("prefill_b1_t16"), Workload)
