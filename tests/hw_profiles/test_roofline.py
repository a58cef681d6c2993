from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hw_profiles.backends.eager import EagerBackend
from hw_profiles.roofline import (
    Operator,
    Peaks,
    Roofline,
    Work,
    measure_peaks,
    measured_peaks,
    peaks_differ,
    work,
)
from hw_profiles.roofline.operator_work import OperatorCounter
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.timing import time_interleaved
from hw_profiles.workload import Workload, decode, prefill
from searchspace import cost
from searchspace.errors import UserError
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec

T, D, F = 24, 32, 64
SOFTMAX = MixerSpec(D, "softmax", 4, 2, 8, position="rope")
CAUSAL = [name for name, mixer in MIXERS.items() if "causal" in mixer.directions]
PEAKS = Peaks(
    gflops={"fp32": 100.0, "int8": 400.0, "bf16": 200.0, "int4": 80.0},
    copy_gb_s={"1024": 100.0, "1048576": 10.0},
    op_us=2.0,
    view_us=1.0,
)
ROOFLINE = Roofline(PEAKS)
ONES, ROWS = torch.ones(10, 10), torch.tensor([1, 2])


def causal_spec(name: str) -> MixerSpec:
    mixer = MIXERS[name]
    heads = {"grouped": (4, 2), "equal": (4, 4), "none": (0, 0)}[mixer.heads]
    return MixerSpec(
        D,
        name,
        *heads,
        8 if heads[0] else 0,
        position=mixer.positions[0],
        max_tokens=64 if mixer.bounded else 0,
    )


@pytest.mark.parametrize(
    ("precision", "counted", "workload"),
    [
        ("fp32", "fp32", prefill(2, T)),
        ("fp8", "fp8", prefill(2, T)),
        ("int8", "int8", prefill(2, T)),
        ("ternary", "int8", prefill(2, T)),
        ("int8_weight", "int8_weight", decode(1, T)),
        ("int4", "int4", decode(1, T)),
    ],
)
def test_products_are_counted_in_the_precision_they_run_in(
    precision: str, counted: str, workload: Workload
) -> None:
    done = work(FFNSpec(D, "relu", F, precision=precision), workload)
    tokens = workload.batch * workload.new_tokens
    assert done.flops_by_precision == {counted: 2 * tokens * 2 * D * F}


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mixer_has_work_in_both_phases(name: str) -> None:
    spec = causal_spec(name)
    prompt, step = work(spec, prefill(1, T)), work(spec, decode(1, T))
    stream_bytes = 2 * T * D * 4
    assert prompt.bytes_moved > stream_bytes
    assert prompt.num_ops >= 2 and step.num_ops >= 2
    assert sum(step.flops_by_precision.values()) <= sum(prompt.flops_by_precision.values())


@pytest.mark.parametrize("name", FFNS)
def test_ffn_products_agree_with_the_flop_counter_on_meta(name: str) -> None:
    spec = FFNSpec(D, name, F)
    assert work(spec, prefill(1, T)).flops_by_precision == {"fp32": cost.flops(spec, T)}


def test_a_decode_step_attends_to_the_whole_context() -> None:
    def attention_flops(context: int) -> float:
        return 2 * 2 * 4 * 8 * (context + 1)

    short, long = work(SOFTMAX, decode(1, 10)), work(SOFTMAX, decode(1, 40))
    gained = long.flops_by_precision["fp32"] - short.flops_by_precision["fp32"]
    assert gained == attention_flops(40) - attention_flops(10)
    key_value_bytes = 2 * 2 * 8 * 4 * (40 - 10)
    assert long.bytes_moved - short.bytes_moved >= key_value_bytes
    assert long.num_ops == short.num_ops


def test_ends_read_only_the_embeddings_of_their_tokens() -> None:
    small, large = EndsSpec(D, 50), EndsSpec(D, 5000)
    grown = work(large, prefill(1, T)).bytes_moved - work(small, prefill(1, T)).bytes_moved
    head_and_logits = (5000 - 50) * (D + T) * 4
    assert grown == head_and_logits


def count(run: Callable[[], Any]) -> Work:
    with torch.no_grad(), OperatorCounter() as counter:
        run()
    return counter.work()


@pytest.mark.parametrize(
    ("run", "bytes_moved"),
    [
        (lambda x: x + x, 3 * 400),
        (lambda x: x.add_(1.0), 2 * 400),
        (lambda x: x.copy_(ONES), 2 * 400),
        (lambda x: torch.zeros_like(x), 400),
        (lambda x: x[0].expand(10, 10) + x, 40 + 2 * 400),
        (lambda x: x[ROWS], 2 * 80 + 16),
        (lambda x: x.index_put_((ROWS,), ONES[:2]), 2 * (80 + 16)),
        (lambda x: x.to(torch.bfloat16), 400 + 200),
    ],
)
def test_bytes_read_and_written(run: Callable[[torch.Tensor], Any], bytes_moved: int) -> None:
    x = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    assert count(lambda: run(x)).bytes_moved == bytes_moved


def test_views_are_free() -> None:
    x = torch.zeros(4, 6)
    done = count(lambda: (x.t(), x.view(24), x[1:], x.reshape(2, 12), x.detach()))
    assert done.operators == ()
    assert done.num_views == 5


def test_a_product_is_one_operator() -> None:
    x = torch.zeros(3, 5)
    done = count(lambda: x @ x.t())
    assert done.operators == ((Operator("fp32", 2 * 3 * 5 * 3, 4 * (15 + 15 + 9)), 1),)


def test_work_is_found_once_and_leaves_no_traces() -> None:
    spec = replace(SOFTMAX, mixer="sliding_window", options=(("window", 8),))
    assert work(spec, prefill(1, 37)) is work(spec, prefill(1, 37))
    generator = torch.Generator().manual_seed(0)
    block = build_for_timing(spec, generator)
    inputs = sub_block_inputs(spec, prefill(1, 37), generator)
    with torch.inference_mode():
        assert bool(block(inputs).isfinite().all())


def test_prior_takes_the_slower_of_arithmetic_and_memory_for_each_operator() -> None:
    fixed_us = PEAKS.op_us
    arithmetic = Work(((Operator("fp32", 1e6, 1024.0), 1),), 0)
    assert ROOFLINE.prior_us(arithmetic) == pytest.approx(1e6 / 100e3 + fixed_us)
    quantised = Work(((Operator("int8", 1e6, 1024.0), 2),), 0)
    assert ROOFLINE.prior_us(quantised) == pytest.approx(2 * (1e6 / 400e3 + fixed_us))
    memory = Work(((Operator("", 0.0, float(1 << 20)), 1),), 3)
    assert ROOFLINE.prior_us(memory) == pytest.approx((1 << 20) / 10e3 + fixed_us + 3.0)
    assert ROOFLINE.rates_share(Work(((Operator("", 0.0, 0.0), 5),), 4)) == pytest.approx(0.0)


def test_a_precision_without_a_rate_counts_as_fp32() -> None:
    known = Work(((Operator("fp32", 1e6, 8.0), 1),), 0)
    unknown = Work(((Operator("fp6", 1e6, 8.0), 1),), 0)
    assert ROOFLINE.prior_us(unknown) == ROOFLINE.prior_us(known)


def test_copy_rates_are_interpolated_between_sizes_and_kept_beyond() -> None:
    assert PEAKS.bytes_per_us(0) == PEAKS.bytes_per_us(1024) == pytest.approx(100e3)
    assert PEAKS.bytes_per_us(1 << 15) == pytest.approx(math.sqrt(100e3 * 10e3))
    assert PEAKS.bytes_per_us(1 << 30) == pytest.approx(10e3)


def test_peaks_survive_json() -> None:
    text = json.dumps(ROOFLINE.to_dict())
    assert Roofline.from_dict(json.loads(text)) == ROOFLINE


@pytest.mark.parametrize(
    "damage",
    [
        {"op_us": 0.0},
        {"view_us": "fast"},
        {"gflops": {"int8": 3.0}},
        {"gflops": {"fp32": math.nan}},
        {"gflops": 5.0},
        {"copy_gb_s": {}},
        {"copy_gb_s": {"a lot": 3.0}},
        {"more": 1.0},
    ],
)
def test_damaged_peaks_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="profile again"):
        Peaks.from_dict({**PEAKS.to_dict(), **damage})


@pytest.mark.usefixtures("undisturbed", "one_thread")
def test_peaks_of_this_machine_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_peaks, "ROUNDS", 2)
    monkeypatch.setattr(measured_peaks, "PRODUCT_SIZE", 128)
    monkeypatch.setattr(measured_peaks, "COPY_BYTES", {"cpu": (1 << 16, 1 << 23)})
    peaks = measure_peaks(EagerBackend())
    assert {"fp32", "bf16", "int8", "int8_weight", "int4"} <= set(peaks.gflops)
    assert set(peaks.copy_gb_s) == {str(1 << 16), str(1 << 23)}
    assert Peaks.from_dict(json.loads(json.dumps(peaks.to_dict()))) == peaks
    assert peaks_differ(peaks, peaks) == []


def scaled(peaks: Peaks, factor: float) -> Peaks:
    return Peaks(
        {name: factor * rate for name, rate in peaks.gflops.items()},
        {size: factor * rate for size, rate in peaks.copy_gb_s.items()},
        peaks.op_us / factor,
        peaks.view_us / factor,
    )


def test_only_ratios_between_rates_make_devices_differ() -> None:
    assert peaks_differ(PEAKS, scaled(PEAKS, 1.7)) == []
    slightly = replace(PEAKS, gflops={**PEAKS.gflops, "int8": 440.0})
    assert peaks_differ(PEAKS, slightly) == []
    other = scaled(replace(PEAKS, gflops={**PEAKS.gflops, "int8": 200.0}), 0.6)
    (sentence,) = peaks_differ(PEAKS, other)
    assert "int8 products" in sentence and "2.00 times as fast here" in sentence
    (sentence,) = peaks_differ(replace(PEAKS, op_us=4.0), PEAKS)
    assert "small operators" in sentence and "0.50 times" in sentence


@pytest.mark.usefixtures("undisturbed", "one_thread")
def test_a_busy_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measured_peaks, "ROUNDS", 2)
    monkeypatch.setattr(measured_peaks, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(measured_peaks, "COPY_BYTES", {"cpu": (1 << 16,)})

    def busy(*args: Any, **options: Any) -> Any:
        timings = time_interleaved(*args, **options)
        return {**timings, "int8": replace(timings["int8"], reliable=False)}

    monkeypatch.setattr(measured_peaks, "time_interleaved", busy)
    with caplog.at_level(logging.WARNING):
        measure_peaks(EagerBackend(), reference_us=1000.0)
    assert "int8" in caplog.text and "fp32" not in caplog.text
