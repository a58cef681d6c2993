"""Replicas, kernels and the driver, without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hw_profiles.backends.cuda import device as cuda_device
from hw_profiles.backends.cuda import graph_call, precisions
from hw_profiles.backends.cuda.graph_call import ReadTensors, num_repeats
from hw_profiles.backends.cuda.precisions import OWN_KERNELS, lacking_kernel
from hw_profiles.backends.cuda.replicas import MAX_REPLICAS, Replica, num_replicas, replicate
from hw_profiles.backends.eager import runner
from hw_profiles.roofline.operator_work import OperatorCounter
from hw_profiles.workload import Workload, decode, prefill
from nas_kernels import (
    dispatch,
    fp8_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
    ternary_linear,
)
from nas_kernels.constants import cached_constant
from searchspace.linear import Linear
from searchspace.precisions import ternary
from searchspace.specs import FFNSpec, MixerSpec
from tests.hw_profiles.backends.conftest import CPU, make, relative_rms

SOFTMAX = MixerSpec(24, "softmax", 3, 3, 8, position="rope")
LINEAR = MixerSpec(24, "linear_elu", 3, 3, 8)
WINDOW = MixerSpec(24, "sliding_window", 3, 1, 8, position="rope", options=(("window", 4),))
FFN = FFNSpec(24, "relu", 40)


@pytest.mark.parametrize(
    ("replica_bytes", "cache_bytes", "expected"),
    [(10, 100, 11), (33, 100, 5), (99, 100, 3), (100, 100, 2), (199, 100, 2), (200, 100, 1)],
)
def test_replicas_between_two_runs_of_one_fill_the_cache(
    replica_bytes: int, cache_bytes: int, expected: int
) -> None:
    assert num_replicas(replica_bytes, cache_bytes) == expected
    if expected > 1:
        assert (expected - 1) * replica_bytes >= cache_bytes


def test_few_replicas_without_a_cache_and_not_too_many_with_one() -> None:
    assert num_replicas(10, 0) == 1
    assert num_replicas(0, 50 << 20) == MAX_REPLICAS


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 10, 11, 64])
def test_a_graph_runs_every_replica_equally_often(replicas: int) -> None:
    repeats = num_repeats(replicas)
    assert repeats >= graph_call.MIN_REPEATS and repeats % replicas == 0
    assert repeats - replicas < graph_call.MIN_REPEATS


@pytest.mark.parametrize("spec", [SOFTMAX, LINEAR, WINDOW, FFN])
@pytest.mark.parametrize("workload", [prefill(2, 13), decode(3, 11)])
def test_replicas_compute_what_eager_does_each_time_anew(
    spec: MixerSpec | FFNSpec, workload: Workload
) -> None:
    module, inputs = make(spec, workload)
    with torch.inference_mode():
        expected = runner(module, inputs, workload)()
        replica = Replica.of(module, inputs, workload, CPU)
        first, second = replica.run(), replica.run()
    assert relative_rms(first, expected) < 1e-6
    assert relative_rms(second, first) == 0.0


def test_decode_starts_from_the_context() -> None:
    workload = decode(1, 9)
    replica = Replica.of(*make(SOFTMAX, workload), workload, CPU)
    with torch.inference_mode():
        for _ in range(3):
            replica.run()
            assert replica.state.length == 10


def test_replicas_share_no_memory_and_leave_the_module_alone() -> None:
    workload = decode(1, 9)
    module, inputs = make(SOFTMAX, workload)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    replicas = replicate(module, inputs, workload, CPU, cache_bytes=30_000)
    size = replicas[0].num_bytes()
    state = 2 * 3 * 10 * 8 * 4
    weights = sum(tensor.numel() * 4 for tensor in before.values())
    assert size == weights + state + inputs.numel() * 4
    assert len(replicas) == num_replicas(size, 30_000) > 2
    kept = [replica.state.k_BGSK.data_ptr() for replica in replicas]
    kept += [replica.inputs.data_ptr() for replica in replicas]
    for owner in [module, *(replica.module for replica in replicas)]:
        kept += [parameter.data_ptr() for parameter in owner.parameters()]
    assert len(set(kept)) == len(kept)
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())


def test_reading_is_told_from_making() -> None:
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    row = right[1]
    with ReadTensors() as read:
        made = left @ right
        made.add_(row).mul_(2.0)
        (made @ torch.ones(5, 2)).sum()
    found = {tensor.data_ptr() for tensor in read.found.values()}
    assert found == {left.data_ptr(), right.data_ptr()}


def test_what_kernels_read_from_caches_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is no operator of PyTorch, so no mode sees what it reads."""
    stand_ins = {"get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    @cached_constant
    def tile_lists(number: int) -> tuple[torch.Tensor, ...]:
        return torch.arange(number), torch.ones(number)

    before = tile_lists(5)
    found = graph_call.tensors_read(lambda: tile_lists(5), None)  # type: ignore[arg-type]
    for tensor in before:
        assert any(tensor is other for other in found)
    assert not tile_lists.__globals__["_users"]


def test_kernels_run_where_reading_is_watched() -> None:
    x = torch.ones(2)
    assert dispatch._watched([x]) is None
    with ReadTensors():
        assert dispatch._watched([x]) is None
        with OperatorCounter():
            assert dispatch._watched([x]) == "operations are being intercepted"
    with OperatorCounter(), ReadTensors():
        assert dispatch._watched([x]) == "operations are being intercepted"
    with FakeTensorMode(), ReadTensors():
        assert dispatch._watched([x]) == "operations are being intercepted"


@pytest.mark.parametrize("precision", OWN_KERNELS)
def test_with_a_kernel_of_our_own_nothing_is_lacking(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def use_triton(operation: str, *tensors: object, **options: object) -> bool:
        asked.append(operation)
        return True

    monkeypatch.setattr(precisions, "use_triton", use_triton)
    for rows, out_features, in_features in ((1, 32, 64), (1, 30, 7), (17, 30, 60), (64, 64, 64)):
        assert lacking_kernel(precision, rows, out_features, in_features, CPU) == ""
    of_rule = set(asked)
    asked.clear()
    # The packed map asks about the same operation when it runs.
    for module in (int8_linear, int8_weight_linear, int4_linear, ternary_linear, ternary):
        monkeypatch.setattr(module, "use_triton", lambda *a, **k: use_triton(*a, **k) and False)
    monkeypatch.setattr(ternary, "may_have_kernels", lambda x: True)
    linear = Linear(32, 64, precision)
    linear.reset(torch.Generator().manual_seed(0))
    linear.pack()
    linear(torch.ones(40, 32))
    assert of_rule < {*asked} or of_rule == {*asked}


@pytest.mark.parametrize(("capability", "sizes", "lacks"), [
    ((9, 0), (1, 64, 32), False),
    ((8, 9), (300, 16, 16), False),
    ((8, 6), (300, 16, 16), True),
    ((9, 0), (300, 20, 16), True),
    ((9, 0), (300, 16, 8), True),
])  # fmt: skip
def test_fp8_needs_a_chip_and_multiples(
    capability: tuple[int, int],
    sizes: tuple[int, int, int],
    lacks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8_linear, "_capability", lambda device: capability)
    assert ("8.9" in lacking_kernel("fp8", *sizes, torch.device("cuda", 0))) == lacks
    assert "8.9" in lacking_kernel("fp8", *sizes, CPU)


@pytest.mark.parametrize("precision", ["int8", "ternary", "int8_weight", "int4"])
def test_without_one_the_rule_is_that_of_pytorch(precision: str) -> None:
    for rows in (1, 8, 9, 16, 17, 32, 33, 128):
        for out_features, in_features in ((32, 64), (30, 64), (32, 60), (48, 96)):
            x = torch.zeros(rows, in_features, device="meta")
            on_gpu = SimpleNamespace(
                device=torch.device("cuda"),
                is_cuda=True,
                is_cpu=False,
                shape=x.shape,
                dtype=x.dtype,
            )
            weight = torch.zeros(out_features, in_features, device="meta")
            if precision == "int4":
                there = int4_linear.has_kernel(on_gpu.device, out_features, in_features)
                falls_back = int4_linear.prefers_kernel(x) and not there
            elif precision == "int8_weight":
                few = rows <= int8_weight_linear.KERNEL_TOKENS
                falls_back = few and not int8_weight_linear._has_kernel(on_gpu, weight)  # type: ignore[arg-type]
            else:
                falls_back = not int8_linear._has_kernel(on_gpu, weight)  # type: ignore[arg-type]
            lacks = lacking_kernel(precision, rows, out_features, in_features, CPU)
            assert lacks.startswith("without Triton") == falls_back


class FakeNvml:
    def __init__(self, code: int) -> None:
        self.code = code
        self.closed = 0

    def nvmlInit_v2(self) -> int:
        return self.code

    def nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:
        text.value = b"580.159.04"
        return 0

    def nvmlShutdown(self) -> None:
        self.closed += 1


def test_the_driver_says_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = FakeNvml(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    assert cuda_device.driver_version() == "580.159.04" and nvml.closed == 1
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(9))
    assert cuda_device.driver_version() == ""

    def absent(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.setattr(cuda_device, "KERNEL_MODULE", tmp_path / "version")
    assert cuda_device.driver_version() == ""
    (tmp_path / "version").write_text("570.86.15\n")
    assert cuda_device.driver_version() == "570.86.15"
