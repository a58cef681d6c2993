"""The CUDA backend on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hw_profiles.backends.base import UnsupportedError
from hw_profiles.backends.cuda import CudaBackend, current_device
from hw_profiles.backends.cuda.graph_call import GraphCall, PlainCall
from hw_profiles.backends.cuda.precisions import lacking_kernel
from hw_profiles.backends.cuda.replicas import MAX_REPLICAS
from hw_profiles.backends.eager import runner
from hw_profiles.energy import energy_meters, measure_energy_mj
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.timing import Sentinel, measured_sentinel, time_interleaved
from hw_profiles.workload import Workload, decode, prefill
from searchspace.ends import example_inputs
from searchspace.mixers.attention import causal_mask
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec, MixerSpec
from searchspace.subnet import Subnet

pytestmark = pytest.mark.gpu

FP32_RMS, LOW_BIT_RMS = 1e-4, 2e-2
FP8_RMS = 6e-2
"""Between two maps the GPU rounds to bf16: numbers move on to neighbours in the next one's grid."""
SPECS: list[MixerSpec | FFNSpec] = [
    *(MixerSpec(128, name, 4, 2, 32) for name in ("softmax", "linear_elu", "retention", "gla")),
    MixerSpec(128, "deltanet", 4, 4, 32),
    MixerSpec(128, "hyena", 4, 4, 32, max_tokens=128),
    MixerSpec(128, "softmax", 4, 2, 32, position="rope"),
    MixerSpec(128, "strided", 4, 4, 32, position="alibi", options=(("stride", 8),)),
    MixerSpec(128, "sliding_window", 4, 1, 32, position="rope", options=(("window", 16),)),
    FFNSpec(128, "swiglu", 320),
]


@pytest.fixture
def backend() -> CudaBackend:
    made = CudaBackend()
    assert made.unavailable() == ""
    return made


def make(spec: MixerSpec | FFNSpec, workload: Workload) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return build_for_timing(spec, generator), sub_block_inputs(spec, workload, generator)


def difference(actual: object, expected: object) -> float:
    """Return the relative RMS of a difference."""
    assert isinstance(actual, Tensor) and isinstance(expected, Tensor)
    assert actual.is_cuda and actual.shape == expected.shape
    actual = actual.cpu().double()
    rms = (actual - expected.double()).square().mean().sqrt()
    return float(rms / expected.double().square().mean().sqrt())


@pytest.mark.parametrize("workload", [prefill(2, 71), decode(3, 64)], ids=lambda w: w.phase)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_replays_compute_what_the_cpu_does(
    backend: CudaBackend, spec: MixerSpec | FFNSpec, workload: Workload
) -> None:
    module, inputs = make(spec, workload)
    with torch.inference_mode():
        expected = runner(module, inputs, workload)()
    call = backend.prepare(module, inputs, workload)
    assert isinstance(call, GraphCall), backend.plain
    for _ in range(3):
        output = call()
        torch.cuda.synchronize()
        assert difference(output, expected) < FP32_RMS
    assert all(not tensor.is_cuda for tensor in module.state_dict().values())


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "ternary", "int8_weight", "int4"])
def test_low_bit_maps_run_in_prefill(backend: CudaBackend, precision: str) -> None:
    workload = prefill(2, 64)
    if reason := lacking_kernel(precision, 128, 320, 128, current_device()):
        pytest.skip(reason)
    module, inputs = make(FFNSpec(128, "swiglu", 320, precision=precision), workload)
    with torch.inference_mode():
        expected = runner(module, inputs, workload)()
    call = backend.prepare(module, inputs, workload)
    assert isinstance(call, GraphCall), backend.plain
    assert difference(call(), expected) < (FP8_RMS if precision == "fp8" else LOW_BIT_RMS)


LOW_BIT = ["int8", "ternary", "int8_weight", "int4"]


@pytest.mark.parametrize("precision", [*LOW_BIT, "fp8"])
def test_low_bit_maps_run_in_decode(backend: CudaBackend, precision: str) -> None:
    workload = decode(1, 16)
    spec = FFNSpec(128, "swiglu", 320, precision=precision)
    if reason := lacking_kernel(precision, 1, 320, 128, current_device()):
        pytest.skip(reason)
    module, inputs = make(spec, workload)
    with torch.inference_mode():
        expected = runner(module, inputs, workload)()
    call = backend.prepare(module, inputs, workload)
    assert isinstance(call, GraphCall), backend.plain
    assert difference(call(), expected) < (FP8_RMS if precision == "fp8" else LOW_BIT_RMS)


@pytest.mark.parametrize("precision", LOW_BIT)
def test_low_bit_maps_without_a_kernel_are_refused(
    backend: CudaBackend, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_KERNELS", "reference")
    workload = decode(1, 16)
    with pytest.raises(UnsupportedError, match=precision):
        backend.prepare(*make(FFNSpec(128, "swiglu", 320, precision=precision), workload), workload)


@pytest.mark.parametrize("workload", [prefill(1, 64), decode(2, 48)], ids=lambda w: w.phase)
def test_whole_networks_replay(backend: CudaBackend, workload: Workload) -> None:
    space = SearchSpace.load("decoder-small", 256)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network = Subnet(space.smallest()).reset(generator).pack().eval()
    tokens = example_inputs(network.arch.ends, workload.batch, workload.new_tokens, generator)
    try:
        call = backend.prepare(network, tokens, workload)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert isinstance(call, GraphCall), backend.plain
    with torch.inference_mode():
        expected = runner(network, tokens, workload)()
    assert difference(call(), expected) < LOW_BIT_RMS


def test_replays_do_not_depend_on_what_is_freed(backend: CudaBackend) -> None:
    """Masks are kept in caches of 64, weights by the caller: both are gone here."""
    workload = prefill(1, 33)
    spec = MixerSpec(128, "norm_attention", 4, 4, 32)
    module, inputs = make(spec, workload)
    with torch.inference_mode():
        expected = runner(module, inputs, workload)()
    call = backend.prepare(module, inputs, workload)
    del module
    for tokens in range(34, 110):
        causal_mask(0, tokens, tokens, current_device())
    torch.cuda.empty_cache()
    filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    assert difference(call(), expected) < FP32_RMS
    del filler


class Waits(nn.Module):
    """Looks at a value, so that the host waits for the device."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.hidden:
            torch.cuda.current_stream().synchronize()
            return x_BTD * 2.0
        return x_BTD * 2.0 if x_BTD.sum().item() < 1e30 else x_BTD


@pytest.mark.parametrize("hidden", [False, True])
def test_what_cannot_be_captured_is_launched(backend: CudaBackend, hidden: bool) -> None:
    x_BTD, workload = torch.ones(1, 8, 16), prefill(1, 8)
    before = torch.cuda.current_stream()
    call = backend.prepare(Waits(hidden), x_BTD, workload)
    assert isinstance(call, PlainCall) and set(backend.plain) == {"Waits"}
    assert torch.cuda.current_stream() == before
    assert torch.cuda.get_sync_debug_mode() == 0
    assert difference(call(), 2.0 * x_BTD) == 0.0
    module, inputs = make(SPECS[0], workload)
    with torch.inference_mode():
        expected = runner(module, inputs, workload)()
    later = backend.prepare(module, inputs, workload)
    assert isinstance(later, GraphCall)
    assert difference(later(), expected) < FP32_RMS


def test_time_grows_with_the_number_of_runs(backend: CudaBackend) -> None:
    workload = prefill(1, 256)
    call = backend.prepare(*make(FFNSpec(256, "relu", 1024), workload), workload)
    assert isinstance(call, GraphCall)
    with backend.clock() as clock:
        for _ in range(3):
            call()
        once = min(clock.elapsed_ns(call, call.repeats) for _ in range(10))
        many = min(clock.elapsed_ns(call, 20 * call.repeats) for _ in range(10))
        part = min(clock.elapsed_ns(call, 1) for _ in range(10))
    assert 10 * once < many < 30 * once
    assert part * call.repeats == pytest.approx(once, rel=0.5)


def test_weights_come_from_memory(backend: CudaBackend) -> None:
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    workload = prefill(1, 1)
    call = backend.prepare(*make(FFNSpec(512, "relu", 2048), workload), workload)
    assert isinstance(call, GraphCall)
    weights = {
        (weight.data_ptr(), weight.numel() * weight.element_size())
        for replica in call.kept
        for weight in getattr(getattr(replica, "module", None), "parameters", list)()
    }
    assert sum(size for _, size in weights) > facts.L2_cache_size
    assert call.repeats <= 2 * MAX_REPLICAS


def test_the_protocol_repeats_itself(backend: CudaBackend) -> None:
    reference_us = measured_sentinel(backend).reference_us
    assert 50 < reference_us < 50_000
    workload = prefill(1, 128)
    calls = {
        spec.key: backend.prepare(*make(spec, workload), workload) for spec in (SPECS[0], SPECS[-1])
    }
    sentinel = Sentinel(backend.sentinel(), reference_us)
    results = []
    for seed in range(2):
        with backend.clock() as clock:
            results.append(
                time_interleaved(
                    calls, rounds=12, rng=random.Random(seed), sentinel=sentinel, clock=clock
                )
            )
    for key in calls:
        first, second = (result[key].latency_us for result in results)
        assert first == pytest.approx(second, rel=0.1)
        assert 1.0 < first < 5000.0


def test_the_device_is_named(backend: CudaBackend) -> None:
    described = backend.accelerator()
    assert torch.cuda.get_device_name() in described and "SMs" in described
    assert "unknown" not in described


def test_energy_of_a_busy_gpu(backend: CudaBackend, tmp_path: Path) -> None:
    meters = energy_meters(tmp_path)
    if not meters:
        pytest.skip("no energy counter")
    workload = prefill(4, 512)
    call = backend.prepare(*make(FFNSpec(1024, "relu", 4096), workload), workload)
    with backend.clock() as clock:
        reading = measure_energy_mj(call, 2.0, meters, clock)
    assert reading is not None
    assert reading.energy_mj > 0
    assert 5 < reading.idle_watts < reading.busy_watts < 2000
