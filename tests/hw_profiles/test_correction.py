from __future__ import annotations

import numpy as np
import pytest
import torch

from hw_profiles.latency_table.correction import MIB, Correction, Spill, traits, working_set_bytes
from hw_profiles.profiler import correction_fit
from hw_profiles.profiler.correction_fit import Networks, fit_correction
from hw_profiles.workload import decode, prefill
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block
from searchspace.subnet import state_bytes

WORKLOAD = decode(1, 64)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-small", 256)


def made(
    space: SearchSpace, truth: Correction, num: int, noise: float = 0.0, seed: int = 0
) -> Networks:
    """Return networks of random archs whose latencies a correction made, with relative noise."""
    rng = np.random.default_rng(seed)
    specs = [space.decode(row).sub_blocks() for row in space.sample_genotypes(rng, num)]
    us: dict[SubBlockSpec, float] = {}
    for row in specs:
        for spec in row:
            us.setdefault(spec, float(rng.uniform(20, 400)))
    entries = [[us[spec] for spec in row] for row in specs]
    measured = []
    for row, given in zip(specs, entries, strict=True):
        parts = sum(truth.sub_block_us(s, u) for s, u in zip(row, given, strict=True))
        mib = sum(working_set_bytes(spec, WORKLOAD) for spec in row) / MIB
        once = truth.network_us(np.array([sum(given)]), np.array([mib]))[0]
        once += truth.traits_us(trait for spec in row for trait in traits(spec))
        measured.append(float((parts + once) * (1 + noise * rng.standard_normal())))
    return Networks(specs, entries, measured, WORKLOAD)


def predicted(fit: Correction, networks: Networks) -> np.ndarray:
    out = []
    for row, given in zip(networks.specs, networks.entries_us, strict=True):
        parts = sum(fit.sub_block_us(s, u) for s, u in zip(row, given, strict=True))
        mib = sum(working_set_bytes(spec, WORKLOAD) for spec in row) / MIB
        once = fit.traits_us(trait for spec in row for trait in traits(spec))
        out.append(parts + once + fit.network_us(np.array([sum(given)]), np.array([mib]))[0])
    return np.array(out)


TRUTHS = [
    Correction(scale=0.8),
    Correction(scale=1.2, per_sub_block_us=30.0),
    Correction(scale=0.9, per_sub_block_us=12.0, intercept_us=200.0),
    Correction(scale=1.1, intercept_us=-10.0),
    Correction(scale=1.1, spills=(Spill(2.0, 4.0, 60.0, 0.0),)),
    Correction(scale=1.1, intercept_us=30.0, spills=(Spill(1.0, 3.0, 80.0, 0.0),)),
]


@pytest.mark.parametrize("truth", TRUTHS)
def test_fit_recovers_what_made_the_latencies(truth: Correction, space: SearchSpace) -> None:
    fit = fit_correction(made(space, truth, 24))
    for name in ("scale", "per_sub_block_us", "intercept_us"):
        assert getattr(fit, name) == pytest.approx(getattr(truth, name), rel=1e-5, abs=1e-4)
    assert [(s.begin_mib, s.end_mib) for s in fit.spills] == [
        (s.begin_mib, s.end_mib) for s in truth.spills
    ]
    assert fit.mape < 1e-5
    assert fit.num_networks == 24


def test_noise_does_not_buy_more_terms(space: SearchSpace) -> None:
    for num in (16, 200):
        fit = fit_correction(made(space, Correction(), num, 0.03))
        assert not fit.scales
        assert fit.scale == pytest.approx(1.0, abs=0.03)
        assert 1.0 < fit.mape < 5.0


def test_a_ridge_is_taken_where_left_out_networks_say_so(space: SearchSpace) -> None:
    truth = Correction(
        scale=1.1,
        per_sub_block_us=6.0,
        scales={"mixer gla": 0.5, "int8": -0.3, "rmsnorm": 0.2, "ffn swiglu": -0.2},
        once_us={"mixer gla": 60.0, "ffn relu2": -30.0},
        spills=(Spill(2.0, 4.0, 20.0, 0.1),),
    )
    few = fit_correction(made(space, truth, 12))
    assert not few.scales, "too few networks for so many terms"
    fit = fit_correction(made(space, truth, 300, 0.01))
    assert fit.scales["mixer gla"] > 0.1 > 0 > fit.scales["int8"]
    fresh = made(space, truth, 100, seed=5)
    # The same sub-blocks cost other amounts in `fresh`; the correction does not depend on them.
    error = np.abs(predicted(fit, fresh) / np.array(fresh.measured_us) - 1)
    assert error.mean() < 0.02
    affine = fit_correction(made(space, truth, 24, 0.01))
    assert error.mean() < np.abs(predicted(affine, fresh) / np.array(fresh.measured_us) - 1).mean()


def test_intervals_hold_for_nine_networks_in_ten(space: SearchSpace) -> None:
    truth, held = Correction(scale=1.2, intercept_us=20.0), []
    for seed in range(8):
        fit = fit_correction(made(space, truth, 40, 0.05, seed))
        fresh = made(space, truth, 100, 0.05, seed + 100)
        bounds = [fit.interval(value) for value in predicted(fit, fresh)]
        held += [
            low <= us <= high for (low, high), us in zip(bounds, fresh.measured_us, strict=True)
        ]
    assert 0.85 < np.mean(held) < 0.97


def test_nothing_is_priced_below_zero(space: SearchSpace) -> None:
    networks = made(space, Correction(scale=1.3, per_sub_block_us=-24.0), 24)
    fit = fit_correction(networks)
    smallest = min(min(row) for row in networks.entries_us)
    assert fit.scale * smallest + fit.per_sub_block_us > 0


def test_few_networks_only_fit_a_scale(space: SearchSpace) -> None:
    plain = fit_correction(made(space, Correction(scale=2.0), 3))
    assert (plain.scale, plain.num_networks) == (1.0, 3)
    assert plain.mape == pytest.approx(50.0)
    fit = fit_correction(made(space, Correction(scale=2.0, per_sub_block_us=9.0), 5))
    assert (fit.per_sub_block_us, fit.intercept_us, fit.spills) == (0.0, 0.0, ())
    assert fit.scale > 1.9


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_left_out_predictions_equal_explicit_refits(penalty: float) -> None:
    rng = np.random.default_rng(0)
    columns = rng.uniform(1, 9, (15, 3))
    target = columns @ [1.0, 2.0, 0.5] * rng.uniform(0.9, 1.1, 15)
    penalties = np.array([0.0, penalty, penalty])
    _, left_out = correction_fit._left_out(columns, target, penalties)
    relative = columns / target[:, None]
    norms = np.sqrt((relative**2).mean(axis=0))
    for row in range(15):
        x = np.delete(relative / norms, row, 0)
        gram = x.T @ x + np.diag((penalties + 1e-12) * 15)
        weights = np.linalg.solve(gram, x.sum(axis=0)) / norms
        assert left_out[row] == pytest.approx(columns[row] @ weights, rel=1e-6)


def test_dict_round_trip_and_refusals() -> None:
    truth = Correction(
        1.1, 2.0, 3.0, {"int8": 0.1}, {"rope": 2.0}, (Spill(1.0, 2.0, 3.0, 0.1),), 2.0, 0.05, 9
    )
    assert Correction.from_dict(truth.to_dict()) == truth
    for wrong in (
        {"scale": "2"},
        {"scale": -1.0},
        {"mape": float("inf")},
        {"spills": [{"begin_mib": 2.0, "end_mib": 1.0, "us_per_mib": 0.0, "scale": 0.0}]},
        {"num_networks": 2.5},
        {"scales": {"int8": None}},
        {"once_us": {"int8": "x"}},
    ):
        with pytest.raises(ValueError):
            Correction.from_dict({**truth.to_dict(), **wrong})


def test_the_working_set_is_what_a_pass_reads(space: SearchSpace) -> None:
    arch = space.largest()
    for spec in arch.sub_blocks():
        block = build_sub_block(spec)
        weights = sum(p.numel() * p.element_size() for p in block.parameters())
        if isinstance(spec, EndsSpec):
            embedding = 256 * spec.d_model * 4
            assert working_set_bytes(spec, prefill(2, 32)) == weights - embedding * 192 // 256
            assert working_set_bytes(spec, prefill(2, 512)) == weights
            assert working_set_bytes(spec, decode(1, 64)) == weights - embedding * 255 // 256
            continue
        assert working_set_bytes(spec, prefill(1, 64)) == weights
        state = state_bytes([block.init_state(1, 65, None)])
        assert working_set_bytes(spec, decode(1, 64)) == weights + state
    assert torch.get_default_dtype() == torch.float32


def test_traits_name_what_sub_blocks_share(space: SearchSpace) -> None:
    mixer, ffn, *_, ends = space.largest().sub_blocks()
    assert traits(mixer) == ("mixer softmax", "fp32", "layernorm", "rope")
    assert traits(ffn) == ("ffn relu2", "fp32", "layernorm")
    assert traits(ends) == ("ends",)
