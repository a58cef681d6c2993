"""A made-up GPU whose memory is the CPU's, for the logic of the CUDA backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hw_profiles.backends import cuda
from hw_profiles.backends.cuda import device as cuda_device
from hw_profiles.targets import build_for_timing, sub_block_inputs
from hw_profiles.workload import Workload
from searchspace.specs import FFNSpec, MixerSpec

CPU = torch.device("cpu")


@dataclass
class FakeGpu:
    """What the stand-ins for `torch.cuda` record and do."""

    facts: Any
    time_ms: float = 0.0
    replays: int = 0
    fails: str = ""
    checks: list[object] = field(default_factory=list)

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        yield
        if self.fails:
            raise RuntimeError(f"{self.fails}\nand pages of advice")


class FakeStream:
    def __init__(self, device: int = 0) -> None:
        self.waited = 0

    def wait_stream(self, other: object) -> None:
        self.waited += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    facts = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=100_000,
    )
    fake = FakeGpu(facts)

    class FakeGraph:
        def replay(self) -> None:
            fake.replays += 1
            fake.time_ms += 1.0

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            self.at_ms = -1.0

        def record(self) -> None:
            self.at_ms = fake.time_ms

        def synchronize(self) -> None:
            assert self.at_ms >= 0

        def elapsed_time(self, end: FakeEvent) -> float:
            return end.at_ms - self.at_ms

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: facts,
        "current_stream": FakeStream,
        "Stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": fake.checks.append,
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "graph": fake.graph,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda, "current_device", lambda: CPU)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for cached in (cuda._side_stream, cuda._say_plain, cuda_device.describe_device):
        cached.cache_clear()
    return fake


def make(spec: MixerSpec | FFNSpec, workload: Workload) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return build_for_timing(spec, generator), sub_block_inputs(spec, workload, generator)


def relative_rms(actual: object, expected: object) -> float:
    assert isinstance(actual, Tensor) and isinstance(expected, Tensor)
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())
