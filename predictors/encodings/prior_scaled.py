"""Features of candidates for small-sample regressors, each with its expected scale.

A repeated gene (`layers.<i>.<gene>`) gives its mean over the layers, its first two position
moments and one small deviation per layer; globals and means give squares and products. With 20
labels a ridge on such *prior-scaled* columns is about ten times as accurate as on standardised
ones.

Letters: N candidates, n of one block, G genes, B base columns, T summary columns, E extra columns,
K products, P feature columns, D functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.encodings._gene_columns import (
    DEVIATION,
    SCALE,
    SCALED_DEVIATION,
    kind_of_product,
    product_pairs,
    size_column,
    table,
)
from predictors.encodings.genes import Gene, IntMatrix, layer_groups, levels_of

FloatMatrix = NDArray[np.float64]
FeatureMatrix = NDArray[np.float32]
Features = Callable[[IntMatrix], FloatMatrix]

_CHUNK = 1024


@dataclass(frozen=True)
class _Folded:
    """Weights of D functions: of base columns, of those times the size, extras and products."""

    base_DB: FeatureMatrix
    scaled_DB: FeatureMatrix
    extra_DE: FeatureMatrix
    product_DK: FeatureMatrix


class GeneEncoding:
    """Turn level matrices into feature matrices, vectorised.

    Args:
        genes: one per column of the level matrix.
        extra_features: derived columns (parameters, FLOPs, a training-free score): a function from
            a level matrix (N, G) to (N, extra). They are standardised on `reference`.
        reference: level matrix (N, G) that extra columns are standardised on; needed with
            `extra_features`.

    Attributes:
        columns: a name per feature.
        prior_scale: expected size of each feature's effect relative to the others, shape (P,).
        groups: kind of each feature (``global``, ``total``, ``moment``, ``deviation``, …).
    """

    def __init__(
        self,
        genes: Sequence[Gene],
        extra_features: Features | None = None,
        reference: IntMatrix | None = None,
    ) -> None:
        self.genes = tuple(genes)
        self._tables: list[FeatureMatrix] = [
            np.ascontiguousarray(table(gene).T, dtype=np.float32) for gene in self.genes
        ]
        offsets = np.cumsum([0] + [table_KL.shape[0] for table_KL in self._tables])
        self._slices = [slice(a, b) for a, b in pairwise(offsets.tolist())]
        self._extra = extra_features
        self._extra_centre, self._extra_spread = self._standardise_extra(reference)
        self._build()

    def encode(self, candidates: IntMatrix | Sequence[Mapping[str, Any]]) -> FeatureMatrix:
        """Return the features, unscaled, shape (N, P), in float32.

        Args:
            candidates: a level matrix (N, G) or N parameter dictionaries.
        """
        if isinstance(candidates, np.ndarray):
            levels = candidates
        else:
            levels = levels_of(self.genes, candidates)
        features = np.empty((len(levels), len(self.columns)), dtype=np.float32)
        for block, base_BN, summary_TN in self._blocks(levels):
            parts = [summary_TN, self._products(summary_TN), base_BN[self._deviation_columns]]
            if self._size_column is not None:
                parts.append(parts[-1] * summary_TN[self._size_column])
            end = 0
            for part in parts:
                features[block, end : end + len(part)] = part.T
                end += len(part)
        return features

    def multiply(self, levels: IntMatrix, weights: NDArray[Any]) -> FeatureMatrix:
        """Return ``encode(levels) @ weights`` without building the features, shape (N, D).

        What is linear in the base columns is folded into one map of them, so that a million
        candidates take about a second; equal to the product but for float32 rounding.

        Args:
            levels: a level matrix (N, G).
            weights: shape (P, D).
        """
        folded = self._fold(np.asarray(weights, dtype=np.float32))
        out = np.empty((len(levels), weights.shape[1]), dtype=np.float32)
        for block, base_BN, summary_TN in self._blocks(levels):
            total_DN = folded.base_DB @ base_BN
            total_DN += folded.extra_DE @ summary_TN[len(self._summary_TB) :]
            total_DN += folded.product_DK @ self._products(summary_TN)
            if self._size_column is not None:
                total_DN += summary_TN[self._size_column] * (folded.scaled_DB @ base_BN)
            out[block] = total_DN.T
        return out

    def _fold(self, weights_PD: FeatureMatrix) -> _Folded:
        num_products, num_deviations = len(self._left), len(self._deviation_columns)
        ends = np.cumsum(
            [len(self._summary_TB), len(self._extra_centre), num_products, num_deviations]
        )
        linear, extra, product, deviation, scaled = np.split(weights_PD.T, ends, axis=1)
        base_DB = linear @ self._summary_TB
        scaled_DB = np.zeros_like(base_DB)
        # Deviations are base columns, no two of them the same.
        base_DB[:, self._deviation_columns] += deviation
        if self._size_column is not None:
            scaled_DB[:, self._deviation_columns] = scaled
        return _Folded(base_DB, scaled_DB, extra, product)

    def _blocks(self, levels: IntMatrix) -> Iterator[tuple[slice, FeatureMatrix, FeatureMatrix]]:
        """Yield base (B, n) and summary columns (T, n) of blocks that stay in the caches.

        A column lies in one piece of memory: products of columns then cost a fifth.
        """
        extra_NE = self._standardised_extra(levels)
        for start in range(0, len(levels), _CHUNK):
            block = slice(start, start + _CHUNK)
            levels_GN = np.ascontiguousarray(levels[block].T)
            base_BN = np.empty((self._num_base, levels_GN.shape[1]), dtype=np.float32)
            for gene, table_KL, rows, level in zip(
                self.genes, self._tables, self._slices, levels_GN, strict=True
            ):
                if table_KL.shape[1] == gene.num_levels:
                    base_BN[rows] = table_KL[:, level]
                else:
                    base_BN[rows] = 2.0 * (level / (gene.num_levels - 1)) - 1.0
            linear_TN = self._summary_TB @ base_BN
            yield block, base_BN, np.concatenate([linear_TN, extra_NE[block].T])

    def _standardised_extra(self, levels: IntMatrix) -> FeatureMatrix:
        if self._extra is None:
            return np.empty((len(levels), 0), dtype=np.float32)
        extra_NE = np.asarray(self._extra(levels), dtype=np.float64).reshape(len(levels), -1)
        unit = (extra_NE - self._extra_centre) / self._extra_spread
        return np.asarray(np.clip(unit, -4.0, 4.0), dtype=np.float32)

    def _products(self, summary_TN: FeatureMatrix) -> FeatureMatrix:
        products_KN = summary_TN[self._left]
        products_KN *= summary_TN[self._right]
        return products_KN

    def _standardise_extra(self, reference: IntMatrix | None) -> tuple[FloatMatrix, FloatMatrix]:
        if self._extra is None:
            return np.zeros(0), np.ones(0)
        if reference is None:
            raise ValueError("extra_features need a reference sample to be standardised on")
        values = np.asarray(self._extra(reference), dtype=np.float64).reshape(len(reference), -1)
        spread = np.nanstd(values, axis=0)
        return np.nanmean(values, axis=0), np.where(spread > 0, spread, 1.0)

    def _build(self) -> None:
        """Lay out the columns: summaries (linear maps of the base), products, deviations."""
        layers = layer_groups(self.genes)
        repeated = {column for columns in layers.values() for column in columns}
        self._num_base = self._slices[-1].stop if self._slices else 0
        maps: list[FloatMatrix] = []
        names: list[str] = []
        kinds: list[str] = []

        def add(kind: str, name: str, weights_B: FloatMatrix) -> None:
            kinds.append(kind)
            names.append(name)
            maps.append(weights_B)

        for column, gene in enumerate(self.genes):
            if column not in repeated:
                for k, base in enumerate(self._base_of(column)):
                    add("global", f"{gene.name}[{k}]", self._unit(base))
        for name, columns in layers.items():
            self._add_layer_summaries(name, columns, add)
        for k in range(len(self._extra_centre)):
            kinds.append("extra")
            names.append(f"extra[{k}]")
        summary = np.array(maps, dtype=np.float32).reshape(len(maps), self._num_base)
        self._summary_TB = summary
        self._size_column = size_column(kinds)
        pairs = product_pairs(kinds, self._size_column)
        self._left = np.array([a for a, _ in pairs], dtype=np.int64)
        self._right = np.array([b for _, b in pairs], dtype=np.int64)
        deviations = [(c, b) for c in sorted(repeated) for b in self._base_of(c)]
        self._deviation_columns = np.array([b for _, b in deviations], dtype=np.int64)
        product_kinds = [kind_of_product(kinds[a], kinds[b], a == b) for a, b in pairs]
        deviation_names = [f"{self.genes[c].name}.{b}" for c, b in deviations]
        self.columns = names + [f"{names[a]}*{names[b]}" for a, b in pairs] + deviation_names
        self.groups = kinds + product_kinds + ["deviation"] * len(deviations)
        depth = {column: len(columns) for columns in layers.values() for column in columns}
        per_layer = np.array([1.0 / np.sqrt(depth[c]) for c, _ in deviations])
        summary_scale = np.array([SCALE[kind] for kind in kinds + product_kinds])
        self.prior_scale = np.concatenate([summary_scale, DEVIATION * per_layer])
        if self._size_column is not None:
            size = names[self._size_column]
            self.columns += [f"{name}*{size}" for name in deviation_names]
            self.groups += ["scaled_deviation"] * len(deviations)
            scaled = SCALED_DEVIATION * per_layer
            self.prior_scale = np.concatenate([self.prior_scale, scaled])

    def _base_of(self, column: int) -> range:
        return range(self._slices[column].start, self._slices[column].stop)

    def _unit(self, base: int) -> FloatMatrix:
        weights = np.zeros(self._num_base)
        weights[base] = 1.0
        return weights

    def _add_layer_summaries(
        self, name: str, columns: list[int], add: Callable[[str, str, FloatMatrix], None]
    ) -> None:
        widths = {self._slices[c].stop - self._slices[c].start for c in columns}
        if len(widths) > 1:
            # Layers with different choices have no common total: treat each as its own gene.
            for column in columns:
                for base in self._base_of(column):
                    add("moment", f"{self.genes[column].name}[{base}]", self._unit(base))
            return
        position = np.linspace(-1.0, 1.0, len(columns))
        shapes = {"total": np.ones(len(columns)), "slope": position}
        if len(columns) > 2:
            shapes["curve"] = 1.5 * position**2 - 0.5
        for k in range(widths.pop()):
            rows = [self._slices[c].start + k for c in columns]
            for shape, profile in shapes.items():
                weights = np.zeros(self._num_base)
                weights[rows] = profile / len(columns)
                add("total" if shape == "total" else "moment", f"{name}[{k}].{shape}", weights)
