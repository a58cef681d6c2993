"""The one way candidates enter the sampler: a codec between parameters and level matrices.

A level matrix has one int row per candidate and one column per gene; the entry is the position of
the value among the gene's values. A caller with vectorised knowledge of its space derives from
`GeneCodec` and overrides what it knows; `CallableCodec` wraps plain functions of dictionaries.
Letters: N candidates, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from predictors.encodings import Gene, levels_of, params_of
from searchspace.errors import UserError

IntMatrix = NDArray[np.int64]
FloatMatrix = NDArray[np.float64]
Params = dict[str, Any]
CandidateFunction = Callable[[Params], Any]
VectorFunction = Callable[[Sequence[Params]], Any]


class Codec(Protocol):
    """What the sampler asks of a search space, all vectorised over candidates.

    Objective values are in the unit and direction that the study is told; constraints are
    satisfied where <= 0.
    """

    @property
    def genes(self) -> Sequence[Gene]:
        """One gene per matrix column; names equal the study's parameter names."""
        ...

    @property
    def exact_indices(self) -> Sequence[int]:
        """Indices of the study's objectives that `exact_objectives` computes, in its order."""
        ...

    def to_matrix(self, params: Sequence[Mapping[str, Any]]) -> IntMatrix:
        """Return levels, shape (N, G); a missing conditional parameter takes its default."""
        ...

    def to_params(self, matrix: IntMatrix) -> list[Params]:
        """Return one dictionary per row."""
        ...

    def canonical(self, matrix: IntMatrix) -> IntMatrix:
        """Set genes that do not count to their default; equal rows are the same candidate."""
        ...

    def exact_objectives(self, matrix: IntMatrix) -> FloatMatrix:
        """Return the cheap exact objectives, shape (N, len(exact_indices))."""
        ...

    def constraints(self, matrix: IntMatrix) -> FloatMatrix:
        """Return the cheap exact constraints, shape (N, k), satisfied where <= 0."""
        ...

    def features(self, matrix: IntMatrix) -> FloatMatrix:
        """Return extra columns for the predictors, shape (N, f); f may be 0."""
        ...


class GeneCodec:
    """A codec that knows the genes and nothing else; override what the space knows better.

    Args:
        genes: one per matrix column.
    """

    exact_indices: Sequence[int] = ()

    def __init__(self, genes: Sequence[Gene]) -> None:
        self.genes: Sequence[Gene] = tuple(genes)

    def to_matrix(self, params: Sequence[Mapping[str, Any]]) -> IntMatrix:
        """Return levels, shape (N, G)."""
        return levels_of(self.genes, params)

    def to_params(self, matrix: IntMatrix) -> list[Params]:
        """Return one dictionary per row."""
        return params_of(self.genes, matrix)

    def canonical(self, matrix: IntMatrix) -> IntMatrix:
        """Return the rows as they are: every gene counts."""
        return matrix

    def exact_objectives(self, matrix: IntMatrix) -> FloatMatrix:
        """Return no exact objective, shape (N, 0)."""
        return np.empty((len(matrix), 0))

    def constraints(self, matrix: IntMatrix) -> FloatMatrix:
        """Return no constraint, shape (N, 0)."""
        return np.empty((len(matrix), 0))

    def features(self, matrix: IntMatrix) -> FloatMatrix:
        """Return no extra feature, shape (N, 0)."""
        return np.empty((len(matrix), 0))


class LastCosts:
    """Exact objectives of a codec, computed once for a matrix that is asked about repeatedly.

    Args:
        codec: the space.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._matrix: IntMatrix | None = None
        self._values: FloatMatrix = np.empty((0, 0))

    def __call__(self, matrix: IntMatrix) -> FloatMatrix:
        """Return them, shape (N, len(exact_indices)); the matrix must not have been changed."""
        if matrix is not self._matrix:
            self._values = np.asarray(self._codec.exact_objectives(matrix), dtype=np.float64)
            self._matrix = matrix
        return self._values


class CallableCodec(GeneCodec):
    """A codec from plain functions of parameter dictionaries.

    Args:
        genes: one per matrix column.
        exact_objectives: objective index -> function from params to its value.
        constraints: function from params to a value or k values, <= 0 where satisfied.
        canonicalize: sets the parameters of one candidate that do not count to a default.
        features: function from params to f extra columns.
        vectorized: whether these functions, `canonicalize` apart, take a list of n dictionaries
            and return n values or rows; the search then spends far less time in them.
    """

    def __init__(
        self,
        genes: Sequence[Gene],
        exact_objectives: Mapping[int, CandidateFunction | VectorFunction] | None = None,
        constraints: CandidateFunction | VectorFunction | None = None,
        canonicalize: Callable[[Params], Params] | None = None,
        features: CandidateFunction | VectorFunction | None = None,
        vectorized: bool = False,
    ) -> None:
        super().__init__(genes)
        take: Callable[[Any], VectorFunction] = (lambda f: f) if vectorized else _one_by_one
        self._exact = {i: take(f) for i, f in sorted((exact_objectives or {}).items())}
        self.exact_indices = tuple(self._exact)
        self._constraints = None if constraints is None else take(constraints)
        self._canonicalize = canonicalize
        self._features = None if features is None else take(features)

    def canonical(self, matrix: IntMatrix) -> IntMatrix:
        """Apply the caller's `canonicalize` row by row."""
        if self._canonicalize is None or len(matrix) == 0:
            return matrix
        return self.to_matrix([self._canonicalize(p) for p in self.to_params(matrix)])

    def exact_objectives(self, matrix: IntMatrix) -> FloatMatrix:
        """Return one column per exact objective."""
        if not self._exact or len(matrix) == 0:
            return np.empty((len(matrix), len(self._exact)))
        params = self.to_params(matrix)
        return np.hstack(
            [
                _columns(f(params), len(params), f"exact_objectives[{i}]", 1)
                for i, f in self._exact.items()
            ]
        )

    def constraints(self, matrix: IntMatrix) -> FloatMatrix:
        """Return the caller's constraint columns."""
        if self._constraints is None or len(matrix) == 0:
            return super().constraints(matrix)
        params = self.to_params(matrix)
        return _columns(self._constraints(params), len(params), "constraints")

    def features(self, matrix: IntMatrix) -> FloatMatrix:
        """Return the caller's extra feature columns."""
        if self._features is None or len(matrix) == 0:
            return super().features(matrix)
        params = self.to_params(matrix)
        return _columns(self._features(params), len(params), "features")


def gene_of(name: str, distribution: BaseDistribution) -> Gene:
    """Describe an Optuna distribution as a gene.

    Raises:
        UserError: for a kind of distribution that is not known.
    """
    if isinstance(distribution, CategoricalDistribution):
        return Gene(name, "categorical", choices=tuple(distribution.choices))
    if isinstance(distribution, IntDistribution):
        return Gene(
            name,
            "int",
            (),
            distribution.low,
            distribution.high,
            distribution.step,
            distribution.log,
        )
    if isinstance(distribution, FloatDistribution):
        return Gene(
            name,
            "float",
            (),
            distribution.low,
            distribution.high,
            distribution.step,
            distribution.log,
        )
    raise UserError(
        f"parameter {name!r} has a {type(distribution).__name__}; "
        "use a float, int or categorical distribution"
    )


def _one_by_one(function: CandidateFunction) -> VectorFunction:
    return lambda params: [function(one) for one in params]


def _columns(values: Any, rows: int, what: str, width: int | None = None) -> FloatMatrix:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or len(array) != rows:
        raise UserError(
            f"{what} returned shape {array.shape} for {rows} candidates; "
            "return one value or row per candidate"
        )
    array = array.reshape(rows, -1)
    if width is not None and array.shape[1] != width:
        raise UserError(f"{what} returned {array.shape[1]} columns; return {width} per candidate")
    return array
