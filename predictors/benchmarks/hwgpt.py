"""HW-GPT-Bench: what published surrogates say of GPT search spaces, evaluated with numpy.

Genotypes are integer matrices of indices into the choices, one row per architecture:
``[embed, n_layer, bias (0 = True, 1 = False), mlp ratio x L, heads x L]``; genes of layers from
``n_layer`` on are inactive.
Letters: N architectures, L layer slots, G = 3 + 2 L genes.

Source: Sukthanker et al., "HW-GPT-Bench: Hardware-Aware Architecture Benchmark for Language
Models" (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.encodings import Gene
from searchspace.errors import UserError, unknown

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MLP_RATIOS = (2, 3, 4)
_VOCABULARY = 50254
_HEAD_SIZE = 64
_NUM_LINEAR = 5


@dataclass(frozen=True)
class Scale:
    """Choices of one of the benchmark's spaces."""

    embed: tuple[int, int, int]
    num_layers: tuple[int, int, int]
    num_heads: tuple[int, int, int]


SCALES = {
    "s": Scale((192, 384, 768), (10, 11, 12), (4, 8, 12)),
    "m": Scale((256, 512, 1024), (22, 23, 24), (8, 12, 16)),
}


@dataclass(frozen=True)
class HwGptSpace:
    """One space of the benchmark with the surrogates of perplexity and memory.

    Attributes:
        name: ``s`` or ``m``.
        scale: the choices.
        weights: arrays ``<net>/fc<k>.weight`` and ``.bias`` for k = 1..5 and net ``perplexity``
            or ``bf16_memory``.
    """

    name: str
    scale: Scale
    weights: Mapping[str, NDArray[Any]]

    @staticmethod
    def load(folder: Path, name: str) -> HwGptSpace:
        """Read ``hwgpt_<name>.npz`` from a folder.

        Raises:
            UserError: when the space is unknown or its file is absent.
        """
        if name not in SCALES:
            raise unknown("HW-GPT-Bench space", name, SCALES)
        path = Path(folder) / f"hwgpt_{name}.npz"
        if not path.is_file():
            raise UserError(f"{path} is absent; give the folder that holds hwgpt_{name}.npz")
        with np.load(path, allow_pickle=False) as arrays:
            return HwGptSpace(name, SCALES[name], dict(arrays))

    @property
    def depth(self) -> int:
        """Number of layer slots, L."""
        return self.scale.num_layers[-1]

    @property
    def genes(self) -> list[Gene]:
        """The genes in the order of a genotype's columns."""
        layers = range(self.depth)
        heads = self.scale.num_heads
        return [
            Gene("embed", "categorical", self.scale.embed),
            Gene("n_layer", "categorical", self.scale.num_layers),
            Gene("bias", "categorical", (True, False)),
            *[Gene(f"layers.{i}.mlp_ratio", "categorical", MLP_RATIOS) for i in layers],
            *[Gene(f"layers.{i}.num_heads", "categorical", heads) for i in layers],
        ]

    def sample(self, rng: np.random.Generator, num: int) -> IntArray:
        """Return genotypes with every gene uniform, shape (num, G), as the benchmark draws them."""
        sizes = [len(gene.choices) for gene in self.genes]
        return self.canonical(rng.integers(0, sizes, size=(num, len(sizes))))

    def active(self, X: IntArray) -> NDArray[np.bool_]:
        """Return which layers are there, shape (N, L)."""
        num_layers = np.array(self.scale.num_layers)[X[:, 1]]
        return np.asarray(np.arange(self.depth) < num_layers[:, None])

    def canonical(self, X: IntArray) -> IntArray:
        """Return genotypes whose inactive genes are 0: equal rows are equal networks."""
        return np.hstack([X[:, :3], X[:, 3:] * np.tile(self.active(X), 2)])

    def masked(self, X: IntArray) -> FloatArray:
        """Return the values of all genes, shape (N, G), NaN where a gene is inactive."""
        tables = [np.array(gene.choices, dtype=np.float64) for gene in self.genes]
        values = np.stack([table[X[:, g]] for g, table in enumerate(tables)], axis=1)
        there = np.hstack([np.ones((len(X), 3), dtype=bool), np.tile(self.active(X), 2)])
        return np.where(there, values, np.nan)

    def one_hot(self, X: IntArray) -> FloatArray:
        """Return embed, layers, MLP ratios, heads and bias one-hot; inactive layers are all 0."""
        eye, there = np.eye(3), self.active(X)[:, :, None]
        mlp, heads = X[:, 3 : 3 + self.depth], X[:, 3 + self.depth :]
        per_layer = [(eye[genes] * there).reshape(len(X), -1) for genes in (mlp, heads)]
        return np.hstack([eye[X[:, 0]], eye[X[:, 1]], *per_layer, np.eye(2)[X[:, 2]]])

    def perplexity(self, X: IntArray) -> FloatArray:
        """Return the surrogate's perplexity, shape (N,)."""
        return self._network("perplexity", self.one_hot(X))

    def bf16_memory_mb(self, X: IntArray) -> FloatArray:
        """Return the surrogate's memory in MB at bf16, shape (N,)."""
        # Every value scaled to 0..1 over its choices, -1 where there is no layer.
        choices = [np.array(gene.choices, dtype=np.float64) for gene in self.genes]
        low = np.array([values.min() for values in choices])
        unit = (self.masked(X) - low) / (np.array([values.max() for values in choices]) - low)
        layers = np.where(np.isnan(unit[:, 3:]), -1.0, unit[:, 3:])
        x = np.hstack([unit[:, :2], layers, unit[:, 2:3]])
        return self._network("bf16_memory", x)

    def num_params(self, X: IntArray) -> FloatArray:
        """Return the parameter count with the benchmark's three-matrix MLP, shape (N,)."""
        there = self.active(X)
        e = np.array(self.scale.embed, dtype=np.float64)[X[:, 0]]
        n = there.sum(axis=1)
        mlp = (np.array(MLP_RATIOS)[X[:, 3 : 3 + self.depth]] * there).sum(axis=1)
        heads = (np.array(self.scale.num_heads)[X[:, 3 + self.depth :]] * there).sum(axis=1)
        bias = X[:, 2] == 0
        weights = 2 * _VOCABULARY * e + 2 * e + 4 * n * e
        weights = weights + 4 * _HEAD_SIZE * heads * e + 3 * e * e * mlp
        biases = 3 * _HEAD_SIZE * heads + n * e + 2 * e * mlp + n * e
        return np.asarray(weights + bias * biases)

    def _network(self, net: str, x: FloatArray) -> FloatArray:
        for k in range(1, _NUM_LINEAR + 1):
            x = x @ self.weights[f"{net}/fc{k}.weight"].T + self.weights[f"{net}/fc{k}.bias"]
            x = np.maximum(x, 0.0) if k < _NUM_LINEAR else x
        return np.asarray(x[:, 0], dtype=np.float64)
