"""A made-up GPU with CUDA graphs, whose memory is the CPU's, for trainings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hw_profiles.backends.cuda.graph_call import CaptureError
from nas.training import graphs, modes
from nas.training.passes import unchanged


@dataclass
class FakeGraphs:
    """What the stand-ins do and record.

    A captured graph does nothing until it is replayed, then it computes from the memory that it was
    captured with and writes where it wrote before.

    Args:
        refuses: why nothing can be captured; empty where it can.
    """

    refuses: str = ""
    captured: int = 0
    replays: int = 0
    written: list[Callable[[], Sequence[Tensor]]] = field(default_factory=list)

    def capture(self, runs: Sequence[Callable[[], Any]], stream: object) -> tuple[Any, Any]:
        if self.refuses:
            raise CaptureError(self.refuses)
        (run,) = runs
        with unchanged(self.written[-1]()):
            outputs = run()
        # Nothing is computed yet: whoever reads it before a replay finds out.
        for tensor in outputs:
            if tensor is not None:
                tensor.fill_(float("nan"))
        self.captured += 1
        return FakeGraph(self, run, outputs), outputs


@dataclass
class FakeGraph:
    """A captured call."""

    gpu: FakeGraphs
    run: Callable[[], Any]
    outputs: tuple[Tensor | None, ...]

    def replay(self) -> None:
        self.gpu.replays += 1
        for static, computed in zip(self.outputs, self.run(), strict=True):
            if static is not None:
                static.copy_(computed)


class FakeStream:
    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None:
        assert isinstance(other, FakeStream)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    """Make trainings on this processor use graphs."""
    gpu = FakeGraphs()
    init = graphs.Graphs.__init__

    def watching(self: Any, device: Any, written: Any) -> None:
        gpu.written.append(written)
        init(self, device, written)

    stand_ins: dict[str, Any] = {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs.Graphs, "__init__", watching)
    monkeypatch.setattr(graphs, "capture", gpu.capture)
    monkeypatch.setattr(modes, "compile_mode", lambda config, device: modes.GRAPHS)
    return gpu
