"""Whether results are those of the reference, by the root mean square of what differs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks._kernel_cases.case import Case, Contender, Results


def compared(
    case: Case, contender: Contender, found: list[Tensor], expected: list[Tensor]
) -> dict[str, Any]:
    """Return status, RMS ratio and, where results are wrong, a note.

    Args:
        case: says how far off is wrong.
        contender: may say otherwise.
        found: results, then gradients.
        expected: the reference's.
    """
    if not contender.same:
        return {"status": "ok", "rms": None, "note": "another function, for context"}
    gradients_differ = contender.wanted is not None and contender.wanted != case.wanted
    if gradients_differ:
        count = len(expected) - len(case.wanted)
        found, expected = found[:count], expected[:count]
    shapes = [tuple(x.shape) for x in found], [tuple(x.shape) for x in expected]
    if shapes[0] != shapes[1]:
        return {"status": "wrong", "rms": None, "note": f"shapes {shapes[0]}, not {shapes[1]}"}
    ratios = [_rms_ratio(a, b) for a, b in zip(found, expected, strict=True)]
    bound = case.bound if contender.bound is None else contender.bound
    right = all(ratio <= bound for ratio in ratios)  # False for NaN
    worst = math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)
    result = {"status": "ok" if right else "wrong", "rms": worst if worst == worst else "nan"}
    return result | ({} if right else {"note": " ".join(f"{ratio:.1e}" for ratio in ratios)})


def _rms_ratio(found: Tensor, expected: Tensor) -> float:
    difference = found.to(expected.dtype) - expected
    size = expected.square().mean(dtype=torch.float64).sqrt().item()
    return difference.square().mean(dtype=torch.float64).sqrt().item() / (size or 1.0)


def detached(results: Results) -> list[Tensor]:
    """Return copies: a later call may write into the same memory."""
    return [result.detach().clone() for result in results]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Have uninitialised memory filled with NaN, so that what is not written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # `torch.use_deterministic_algorithms` would also import the compiler, which takes seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
