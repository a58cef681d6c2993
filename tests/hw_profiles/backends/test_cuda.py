"""The CUDA backend's logic on a made-up GPU; see test_cuda_device.py for a real one."""

from __future__ import annotations

import functools
import logging
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hw_profiles.backends import cuda
from hw_profiles.backends.base import UnsupportedError
from hw_profiles.backends.cuda import CudaBackend, precisions
from hw_profiles.backends.cuda import device as cuda_device
from hw_profiles.backends.cuda.clock import CudaClock
from hw_profiles.backends.cuda.graph_call import GraphCall, PlainCall, num_repeats
from hw_profiles.backends.cuda.replicas import Replica
from hw_profiles.backends.eager import runner
from hw_profiles.device import Device
from hw_profiles.latency_table import LatencyTable
from hw_profiles.profiler.filling import Filling
from hw_profiles.roofline import Peaks, cuda_products, measured_peaks
from hw_profiles.samples import Timing
from hw_profiles.timing import Sentinel, time_interleaved
from hw_profiles.workload import decode, prefill
from searchspace.mixers.attention import causal_mask
from searchspace.specs import FFNSpec, MixerSpec
from tests.hw_profiles.backends.conftest import CPU, FakeGpu, make, relative_rms

SOFTMAX = MixerSpec(24, "softmax", 3, 3, 8, position="rope")
FFN = FFNSpec(24, "relu", 40)


@pytest.mark.parametrize("spec", [SOFTMAX, FFN])
def test_prepare_captures_runs_of_all_replicas(
    gpu: FakeGpu, spec: MixerSpec | FFNSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = Replica.run

    def run(replica: Replica) -> object:
        runs.append(id(replica))
        return real(replica)

    workload = decode(2, 7)
    module, inputs = make(spec, workload)
    expected = runner(module, inputs, workload)()
    monkeypatch.setattr(Replica, "run", run)
    backend = CudaBackend()
    call = backend.prepare(module, inputs, workload)
    assert isinstance(call, GraphCall)
    count = len(set(runs))
    assert count > 2 and call.repeats == num_repeats(count)
    captured = runs[-call.repeats :]
    assert captured[:count] == captured[count : 2 * count] or call.repeats == count
    assert {captured.count(replica) for replica in captured} == {call.repeats // count}
    assert relative_rms(call(), expected) < 1e-6
    assert gpu.replays == 1 and gpu.checks == ["error", 0] and not backend.plain


def test_the_clock_divides_by_the_runs_of_a_call(gpu: FakeGpu) -> None:
    clock, call = CudaClock(), GraphCall(torch.cuda.CUDAGraph(), 10)
    assert clock.elapsed_ns(call, 1) == 100_000
    assert clock.elapsed_ns(call, 10) == 1_000_000
    assert gpu.replays == 2
    assert clock.elapsed_ns(call, 25) == 2_500_000
    assert gpu.replays == 5
    assert clock.elapsed_ns(lambda: None, 3) == 1
    assert clock.run_delay_ns() == 0
    assert clock.now_ns() <= clock.now_ns()


def test_the_protocol_times_one_run_whatever_a_graph_holds(gpu: FakeGpu) -> None:
    calls = {f"{n}": GraphCall(torch.cuda.CUDAGraph(), n) for n in (1, 10, 64)}
    sentinel = Sentinel(GraphCall(torch.cuda.CUDAGraph(), 1), 1000.0)
    timings = time_interleaved(
        calls, rounds=4, rng=random.Random(0), sentinel=sentinel, clock=CudaClock()
    )
    for repeats, timing in timings.items():
        # A fake graph takes a millisecond whatever it holds.
        assert timing.latency_us == pytest.approx(1000.0 / int(repeats), rel=1e-4)
        assert timing.reliable


def test_the_sentinel_is_one_graph(gpu: FakeGpu) -> None:
    backend = CudaBackend()
    sentinel = backend.sentinel()
    assert isinstance(sentinel, GraphCall) and sentinel.repeats == 1
    assert sentinel is backend.sentinel()
    left, right = sentinel.kept
    assert isinstance(left, Tensor) and isinstance(right, Tensor)
    assert relative_rms(sentinel(), left.double() @ right.double()) < 1e-6


class Waits(nn.Module):
    """Looks at values, which a GPU would have to be waited for."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        if len(self.__dict__["asked"]) == 4:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.__dict__["asked"].append(1)
        return x_BTD


def test_what_cannot_be_captured_is_launched_and_said_once(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    workload = prefill(1, 200)
    module, inputs = make(FFN, workload)
    backend = CudaBackend()
    gpu.fails = "operation not permitted when stream is capturing"
    with caplog.at_level(logging.WARNING):
        call = backend.prepare(module, inputs, workload)
        backend.prepare(module, inputs, workload)
    assert isinstance(call, PlainCall) and call.repeats == 1
    assert backend.plain == {type(module.op).__name__: gpu.fails} and call.reason == gpu.fails
    assert len([record for record in caplog.records if gpu.fails in record.message]) == 1
    assert len(call.replicas) > 1
    with torch.inference_mode():
        for _ in range(len(call.replicas) + 1):
            assert relative_rms(call(), module(inputs)) < 1e-6
    assert CudaClock().elapsed_ns(call, 3) >= 1


def test_waiting_for_the_device_is_found_before_a_capture(gpu: FakeGpu) -> None:
    module = Waits()
    module.__dict__["asked"] = []
    gpu.facts.L2_cache_size = 0
    backend = CudaBackend()
    call = backend.prepare(module, torch.zeros(1, 4, 8), prefill(1, 4))
    assert isinstance(call, PlainCall)
    assert "synchronizing" in backend.plain["Waits"]
    assert gpu.checks == ["error", 0]


def test_other_errors_are_not_hidden(gpu: FakeGpu) -> None:
    module, inputs = make(FFN, prefill(1, 4))
    with pytest.raises(RuntimeError, match="shape"):
        CudaBackend().prepare(module, inputs[..., :5], prefill(1, 4))


def test_too_little_memory_is_said(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> list[Replica]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda, "replicate", full)
    module, inputs = make(FFN, prefill(1, 4))
    with pytest.raises(UnsupportedError, match="does not fit into the GPU's memory"):
        CudaBackend().prepare(module, inputs, prefill(1, 4))


def test_a_graph_keeps_the_masks_it_reads(gpu: FakeGpu) -> None:
    spec = MixerSpec(24, "norm_attention", 3, 3, 8)
    workload = prefill(1, 21)
    call = CudaBackend().prepare(*make(spec, workload), workload)
    assert isinstance(call, GraphCall)
    mask = causal_mask(0, 21, 21, CPU)
    kept = [item.data_ptr() for item in call.kept if isinstance(item, Tensor)]
    assert mask.data_ptr() in kept


@pytest.mark.parametrize("precision", ["int8", "ternary", "int8_weight", "int4"])
def test_low_bit_maps_without_a_kernel_are_refused(gpu: FakeGpu, precision: str) -> None:
    spec = FFNSpec(32, "relu", 64, precision=precision)
    module, inputs = make(spec, decode(1, 8))
    with pytest.raises(UnsupportedError, match=f"a {precision} map of 32 to 64 features.* 1 rows"):
        CudaBackend().prepare(module, inputs, decode(1, 8))
    module, inputs = make(spec, prefill(2, 32))
    call = CudaBackend().prepare(module, inputs, prefill(2, 32))
    assert isinstance(call, GraphCall)
    for replica in call.kept:
        if isinstance(replica, Replica):
            assert not any(child._forward_pre_hooks for child in replica.module.modules())


def test_with_kernels_they_run_on_any_number_of_rows(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "use_triton", lambda *given: True)
    module, inputs = make(FFNSpec(32, "relu", 64, precision="int4"), decode(1, 8))
    assert isinstance(CudaBackend().prepare(module, inputs, decode(1, 8)), GraphCall)


def test_fp8_is_refused_where_it_would_be_dequantised(gpu: FakeGpu) -> None:
    module, inputs = make(FFNSpec(32, "relu", 64, precision="fp8"), prefill(1, 64))
    with pytest.raises(UnsupportedError, match=r"a fp8 map of 32 to 64.*capability 8\.9"):
        CudaBackend().prepare(module, inputs, prefill(1, 64))


@pytest.mark.parametrize(
    ("free_gib", "short", "given_back"),
    [([60], False, 0), ([10, 60], False, 1), ([10, 10], True, 1)],
)
def test_memory_is_given_back_before_it_is_called_short(
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    free_gib: list[int],
    short: bool,
    given_back: int,
) -> None:
    calls: list[int] = []
    readings = iter(free_gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(readings) << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    assert cuda.short_of_memory() == short
    assert len(calls) == given_back


def test_a_table_forgets_prepared_calls_where_memory_is_short(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend, workload = CudaBackend(), prefill(1, 3)
    monkeypatch.setattr(cuda_device, "driver_version", lambda: "570.86.15")
    table = LatencyTable(Device.current(backend), (workload,), 1000.0)
    filling = Filling(table, tmp_path / "table.json", backend, (workload,), 0, False)
    answers = {"short": False}
    monkeypatch.setattr(cuda, "short_of_memory", lambda: answers["short"])
    first, second = FFN, FFNSpec(24, "relu", 16)
    filling._prepare([first])
    filling._prepare([second])
    assert set(filling._kept) == {first, second}
    answers["short"] = True
    filling._prepare([second])
    assert set(filling._kept) == {second}


def test_peaks_are_measured_in_graphs(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies and operators, launched one by one, would show how fast Python is."""
    small = functools.partial(cuda_products.cuda_products, size=64)
    monkeypatch.setattr(measured_peaks, "cuda_products", small)
    monkeypatch.setattr(measured_peaks, "COPY_BYTES", {"cuda": (1 << 10, 1 << 14)})
    monkeypatch.setattr(measured_peaks, "ROUNDS", 2)
    seen: dict[str, object] = {}

    def time_all(targets: dict[str, object], **options: object) -> dict[str, Timing]:
        seen.update(targets)
        for call in targets.values():
            call()  # type: ignore[operator]
        return {name: Timing(1.0, 2.0, 0.0, 2, 1.0) for name in targets}

    monkeypatch.setattr(measured_peaks, "time_interleaved", time_all)
    peaks = measured_peaks.measure_peaks(CudaBackend(), reference_us=1000.0)
    graphs = {name for name, call in seen.items() if isinstance(call, GraphCall)}
    assert {"op", "1024", "16384"} < graphs and "view" not in seen
    assert {"fp32", "bf16", "fp16", "int8"} == set(peaks.gflops)
    assert peaks.gflops["fp32"] == pytest.approx(2 * 64**3 / 2.0 / 1e3)
    assert all(0 < rate < float("inf") for rate in peaks.copy_gb_s.values())
    assert peaks.op_us > 100 * peaks.view_us > 0
    assert Peaks.from_dict(peaks.to_dict()) == peaks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_run_on_any_number_of_rows(gpu: FakeGpu, precision: str) -> None:
    workload = decode(1, 8)
    spec = FFNSpec(24, "relu", 44, precision=precision)
    assert isinstance(CudaBackend().prepare(*make(spec, workload), workload), GraphCall)


def test_the_device_is_described(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "driver_version", lambda: "570.86.15")
    described = "NVIDIA H100 80GB HBM3 (sm_90, 132 SMs, driver 570.86.15, CUDA 13.0)"
    backend = CudaBackend()
    assert backend.unavailable() == ""
    assert backend.accelerator() == described
    assert "cuDNN" in backend.version()


def test_a_missing_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    begins = "no CUDA device is visible to PyTorch; "
    lacking = CudaBackend().unavailable()
    assert lacking.startswith(begins) and "built without CUDA" in lacking
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    lacking = CudaBackend().unavailable()
    assert lacking.startswith(begins) and "CUDA_VISIBLE_DEVICES" in lacking
