"""HiGHS asked to solve a programme, through `scipy.optimize.milp`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from nas.assignment.linear import Programme
from nas.assignment.matrices import matrices
from nas.assignment.problem import Choice

OPTIMAL, TIME_OUT, INFEASIBLE = "optimal", "time-out", "infeasible"
_STATUS = {0: OPTIMAL, 1: TIME_OUT, 2: INFEASIBLE}
_STDOUT = 1


@dataclass(frozen=True)
class Answer:
    """What HiGHS says of one programme.

    Args:
        status: ``"optimal"``, ``"time-out"`` or ``"infeasible"``.
        choice: the best that was found; None where nothing was.
        bound: no choice that keeps the limits has a lower objective.
        seconds: of the solver.
    """

    status: str
    choice: Choice | None
    bound: float
    seconds: float


def ask(programme: Programme, time_limit_s: float, margins: Sequence[float] = ()) -> Answer:
    """Solve a programme exactly, or as far as time allows.

    Args:
        programme: what is solved.
        time_limit_s: wall seconds that HiGHS may take.
        margins: by how much each limit is tightened, in shares of it.

    Raises:
        RuntimeError: when HiGHS fails in another way than by time or infeasibility.
    """
    parts = matrices(programme, margins or [0.0] * len(programme.limits))
    start = time.perf_counter()
    with _quiet_stdout():
        result = milp(
            parts.objective,
            constraints=LinearConstraint(sparse.csr_array(parts.rows), parts.lower, parts.upper),
            integrality=parts.integral,
            bounds=Bounds(0.0, np.where(parts.integral > 0, 1.0, np.inf)),
            options={"time_limit": max(time_limit_s, 1e-3), "mip_rel_gap": 0.0},
        )
    seconds = time.perf_counter() - start
    if result.status not in _STATUS:
        raise RuntimeError(f"HiGHS: {result.message}")
    choice = None if result.x is None else parts.choice(result.x)
    # No bound is known where time ran out before the first relaxation was solved.
    bound = -np.inf if result.mip_dual_bound is None else result.mip_dual_bound
    return Answer(
        _STATUS[result.status], choice, float(bound) * parts.scale + parts.offset, seconds
    )


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keep what HiGHS prints past Python (a leftover of its debugging) out of our results."""
    try:
        saved = os.dup(_STDOUT)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), _STDOUT)
        yield
    finally:
        os.dup2(saved, _STDOUT)
        os.close(saved)
