"""Archs as bags of sub-blocks: what occurs how often, wherever it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from predictors.encodings.features import COUNT, Features
from searchspace.arch import Arch
from searchspace.space import SearchSpace


def adjacency_free(archs: Sequence[Arch], space: SearchSpace | None = None) -> Features:
    """Return how often each distinct sub-block occurs in each arch.

    A sub-block is its spec: kind, sizes, norm, precision and all, without its place. The usual
    encodings of cells write down a graph: the adjacency matrix with a list of operations, or the
    set of operations along each path from input to output. Here every network is a chain of
    residual sub-blocks, whose adjacency matrix is always the same and whose one path is the whole
    network; so the graph is dropped and the operations are counted.

    Args:
        archs: of any spaces and families.
        space: not needed.

    Returns:
        Features of shape (number of archs, number of different sub-blocks), named
        ``count of mixer/softmax/d64/h4x2x16/rope/rmsnorm/fp32``, ... in alphabetical order. What
        occurs in none of the archs has no column (see `Features.aligned`).

    Source: White et al. 2020, "A Study on Encodings for Neural Architecture Search", section 3
    (adjacency-matrix and path encodings); ours keeps their operations alone.
    """
    bags = [Counter(spec.key for spec in arch.sub_blocks()) for arch in archs]
    columns = {key: column for column, key in enumerate(sorted({k for bag in bags for k in bag}))}
    values = np.zeros((len(archs), len(columns)))
    for row, bag in enumerate(bags):
        for key, count in bag.items():
            values[row, columns[key]] = count
    return Features(values, tuple(f"{COUNT}{key}" for key in columns))
