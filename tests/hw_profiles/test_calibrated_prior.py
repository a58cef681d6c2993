from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hw_profiles.roofline import (
    CalibratedPrior,
    Peaks,
    Roofline,
    left_out_errors,
    suspicious,
    work,
)
from hw_profiles.roofline.calibrated_prior import kind_of, precision_of
from hw_profiles.workload import Workload, decode, prefill
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, SubBlockSpec

PEAKS = Peaks(
    gflops={"fp32": 100.0, "int8": 400.0, "bf16": 200.0, "int4": 80.0},
    copy_gb_s={"1024": 100.0, "1048576": 10.0},
    op_us=2.0,
    view_us=1.0,
)
ROOFLINE = Roofline(PEAKS)

Entries = dict[tuple[str, str], float]

TOY = [
    FFNSpec(width, name, size, precision=precision)
    for name in ("relu", "gelu", "swiglu")
    for width in (32, 64)
    for size in (64, 128)
    for precision in ("fp32", "int8")
]
PROMPT, STEP = prefill(1, 16), decode(1, 16)


def entries_of(specs: list[FFNSpec], factor: Callable[[FFNSpec, Workload], float]) -> Entries:
    return {
        (workload.name, spec.key): factor(spec, workload) * ROOFLINE.prior_us(work(spec, workload))
        for spec in specs
        for workload in (PROMPT, STEP)
    }


def slowness(spec: FFNSpec, workload: Workload) -> float:
    kind = {"relu": 1.5, "gelu": 3.0, "swiglu": 2.0}[spec.ffn]
    int8_steps = 2.0 if (spec.precision, workload.phase) == ("int8", "decode") else 1.0
    return kind * int8_steps


def test_without_entries_the_prior_is_the_roofline() -> None:
    prior = CalibratedPrior.fit({}, TOY, ROOFLINE)
    expected = [ROOFLINE.prior_us(work(spec, PROMPT)) for spec in TOY]
    np.testing.assert_allclose(prior.predict_us(TOY, PROMPT), expected)


def test_prior_learns_what_kinds_precisions_and_phases_cost() -> None:
    entries = entries_of(TOY[::2] + TOY[1::4], slowness)
    prior = CalibratedPrior.fit(entries, TOY, ROOFLINE)
    for workload in (PROMPT, STEP):
        truth = [slowness(s, workload) * ROOFLINE.prior_us(work(s, workload)) for s in TOY]
        np.testing.assert_allclose(prior.predict_us(TOY, workload), truth, rtol=0.2)


def test_entries_of_unknown_sub_blocks_do_not_count() -> None:
    entries = entries_of(TOY, slowness)
    foreign = {(PROMPT.name, "ffn/relu/d999/f1/rmsnorm/fp32"): 1e9}
    known = CalibratedPrior.fit(entries, TOY, ROOFLINE).predict_us(TOY, PROMPT)
    both = CalibratedPrior.fit({**foreign, **entries}, TOY, ROOFLINE).predict_us(TOY, PROMPT)
    np.testing.assert_array_equal(known, both)


def test_one_disturbed_entry_does_not_spoil_the_others() -> None:
    entries = entries_of(TOY, slowness)
    hit = (PROMPT.name, TOY[0].key)
    fit = CalibratedPrior.fit({**entries, hit: 50 * entries[hit]}, TOY, ROOFLINE)
    undisturbed = CalibratedPrior.fit(entries, TOY, ROOFLINE)
    for workload in (PROMPT, STEP):
        np.testing.assert_allclose(
            fit.predict_us(TOY, workload), undisturbed.predict_us(TOY, workload), rtol=0.15
        )


def test_a_few_entries_cannot_call_themselves_normal() -> None:
    entries = entries_of(TOY[:1], lambda spec, workload: 20.0)
    assert len(suspicious(entries, CalibratedPrior.fit(entries, TOY, ROOFLINE))) == 2


@pytest.mark.parametrize(
    ("trait", "value", "cause"),
    [(precision_of, "int8", "all int8 entries"), (kind_of, "gelu", "all gelu entries")],
)
def test_the_cause_is_what_slow_entries_have_in_common(
    trait: Callable[[SubBlockSpec], str], value: str, cause: str
) -> None:
    entries = entries_of(TOY, lambda spec, workload: 20.0 if trait(spec) == value else 1.3)
    sentences = suspicious(entries, CalibratedPrior.fit(entries, TOY, ROOFLINE))
    assert len(sentences) == sum(trait(spec) == value for spec in TOY) * 2
    assert all(cause in sentence for sentence in sentences)


def test_a_reference_kernel_does_not_excuse_itself_by_its_own_rate() -> None:
    slow = Roofline(replace(PEAKS, gflops={**PEAKS.gflops, "int8": 0.01}))
    specs = [replace(spec, intermediate_size=2048) for spec in TOY[::4]]
    specs += [replace(spec, precision="int8") for spec in specs[:3]]
    entries = {
        (PROMPT.name, spec.key): slow.prior_us(work(spec, PROMPT)) for spec in dict.fromkeys(specs)
    }
    sentences = suspicious(entries, CalibratedPrior.fit(entries, specs, slow))
    assert len(sentences) == 3
    assert all("int8" in sentence for sentence in sentences)


@pytest.fixture(scope="module")
def measured() -> tuple[Entries, list[SubBlockSpec], Roofline]:
    """A table of a two-core x86 machine: every causal mixer and every FFN, one thread."""
    values = json.loads((Path(__file__).parent / "measured_operators.json").read_text())
    latencies = values["latency_us"]
    entries = {
        (workload, key): us for workload in latencies for key, us in latencies[workload].items()
    }
    space = SearchSpace.load(values["preset"], values["vocab_size"])
    found = {spec.key: spec for spec in space.sub_blocks()}
    entries = {name: us for name, us in entries.items() if name[1] in found}
    assert len(entries) > 250
    specs = [found[key] for key in dict.fromkeys(key for _, key in entries)]
    return entries, specs, Roofline.from_dict(values["peaks"])


def test_operators_never_measured_are_predicted_from_the_others(
    measured: tuple[Entries, list[SubBlockSpec], Roofline],
) -> None:
    ratios = left_out_errors(*measured)
    for workload, tolerated in (("prefill_b1_t128", 0.25), ("decode_b1_t128", 0.15)):
        errors = [abs(ratio - 1) for (name, _), ratio in ratios.items() if name == workload]
        assert len(errors) > 120
        assert np.median(errors) < tolerated
    assert set(ratios) == set(measured[0])


def test_a_healthy_table_raises_no_suspicion_and_a_slow_or_fast_entry_does(
    measured: tuple[Entries, list[SubBlockSpec], Roofline],
) -> None:
    entries, specs, roofline = measured
    prior = CalibratedPrior.fit(entries, specs, roofline)
    assert suspicious(entries, prior) == []
    hit = next(iter(entries))
    spoilt = {**entries, hit: 20 * entries[hit]}
    assert len(suspicious(spoilt, CalibratedPrior.fit(spoilt, specs, roofline))) == 1
    for name in list(entries)[::17]:
        for factor, text in ((20.0, "times the time"), (1 / 20, "of the time")):
            changed = {**entries, name: factor * entries[name]}
            (sentence,) = suspicious(changed, prior)
            assert sentence.startswith(f"{name[1]} in {name[0]}") and text in sentence
