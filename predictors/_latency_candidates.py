"""The models that a latency regressor chooses from."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from predictors._latency_design import LatencyDesign
from predictors.models.boosting import BoostedTrees
from predictors.models.covariance import Covariance, Linear, Matern
from predictors.models.gaussian_process import GaussianProcess
from predictors.models.stacking import Candidate

# Trees learn steps; with fewer rows than this they never win.
_MIN_ROWS_OF_TREES = 100
# What the own features add to other devices' latencies is expected to be small.
_ADDED = -1.0


def latency_candidates(design: LatencyDesign, num_rows: int, seed: int) -> list[Candidate]:
    """Return the candidates for a design matrix with `num_rows` rows."""
    raw, sources = design.raw, design.sources
    plain = np.concatenate([raw, design.log] if design.any_logarithm else [raw])
    engineered = np.concatenate([plain, design.products])
    smooth = Matern(_first(len(raw)))
    found = [_process("process on sizes", raw, seed, smooth)]
    if design.any_logarithm:
        found.append(_process("process on logarithms", design.log, seed, smooth))
    ridge = Linear(_first(len(engineered)))
    found.append(_process("ridge on products", engineered, seed, ridge))
    if num_rows >= _MIN_ROWS_OF_TREES:
        columns = np.concatenate([raw, design.products, sources])
        found.append(Candidate("boosted trees", columns, partial(BoostedTrees, seed)))
    if len(sources):
        own = Linear(_first(len(sources)))
        found.append(
            _process("other devices", sources, seed, own, Matern(_first(len(sources)), _ADDED))
        )
        columns = np.concatenate([sources, raw])
        both = Matern(_first(len(columns)), _ADDED)
        found.append(_process("other devices and sizes", columns, seed, own, both))
    return found


def _process(name: str, columns: NDArray[np.int64], seed: int, *terms: Covariance) -> Candidate:
    return Candidate(name, columns, partial(GaussianProcess, terms, seed))


def _first(num: int) -> tuple[int, ...]:
    return tuple(range(num))
