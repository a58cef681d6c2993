"""Shared fixtures: uninitialised memory is poisoned, so a read of it shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; it reads this when the first one is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors gain nothing from threads, and threads that wait for each other on busy cores were
# measured to make tests eight times slower.
torch.set_num_threads(1)

with torch.device("meta"):
    # PyTorch lists the functions that obey a device context at its first use: before the patch.
    torch.empty(1)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN: nothing may depend on it."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        if out.is_floating_point() and not out.is_meta:
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", empty)
    yield


@pytest.fixture(autouse=True)
def ordinary_floats() -> Iterator[None]:
    """Undo what `prepare_process` sets for the whole process: tests may need denormal numbers."""
    yield
    torch.set_flush_denormal(False)
