"""Archs as the genes of their space: one column per gene, or one per choice.

A gene that does not count (of a skipped layer, an option of another mixer, the heads of a mixer
without heads) says nothing about the network and is masked.
Letters: N archs, G genes, S layer slots, P features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.encodings.features import Features, FloatMatrix
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.space.canonical import Genotypes
from searchspace.space.halves import Half

Mask = NDArray[np.bool_]
HEADS = ("num_heads", "num_kv_heads")
"""What the gene ``heads`` ("4x2") is made of."""


def integer(archs: Sequence[Arch], space: SearchSpace | None) -> Features:
    """Return one column per gene of the space that has a choice.

    A number (a width, a number of heads, ...) is itself; another choice is its place in the
    space's list, counted from 0; false is 0 and true 1. The gene ``heads`` gives two columns,
    ``num_heads`` and ``num_kv_heads``. A gene that does not count is NaN: not there.

    Args:
        archs: archs of the space.
        space: says which genes there are.

    Returns:
        Features of shape (N, P), named ``d_model``, ``layers.2.intermediate_size``, ...

    Raises:
        UserError: without a space, or for an arch that is not in it.
    """
    space = _required(space)
    genotypes = encode_all(archs, space)
    counts = counting(space, genotypes)
    columns: list[FloatMatrix] = []
    names: list[str] = []
    for column, (name, choices) in enumerate(space.genes.items()):
        for part, values in _numbers(name, choices).items():
            names.append(part)
            columns.append(np.where(counts[:, column], values[genotypes[:, column]], np.nan))
    return Features(_stacked(columns, len(archs)), tuple(names))


def one_hot(archs: Sequence[Arch], space: SearchSpace | None) -> Features:
    """Return one column per choice of every gene of the space, 1 where it is taken.

    All columns of a gene that does not count are 0.

    Args:
        archs: archs of the space.
        space: says which genes there are.

    Returns:
        Features of shape (N, P), named ``layers.2.mixer=softmax``, ...

    Raises:
        UserError: without a space, or for an arch that is not in it.
    """
    space = _required(space)
    genotypes = encode_all(archs, space)
    counts = counting(space, genotypes)
    columns: list[FloatMatrix] = []
    names: list[str] = []
    for column, (name, choices) in enumerate(space.genes.items()):
        for index, choice in enumerate(choices):
            names.append(f"{name}={str(choice).lower() if isinstance(choice, bool) else choice}")
            taken = counts[:, column] & (genotypes[:, column] == index)
            columns.append(taken.astype(np.float64))
    return Features(_stacked(columns, len(archs)), tuple(names))


def _required(space: SearchSpace | None) -> SearchSpace:
    if space is None:
        raise UserError(
            "encodings of genes need the archs' space; give it, or choose 'aggregate' or "
            "'adjacency_free'"
        )
    return space


def encode_all(archs: Sequence[Arch], space: SearchSpace) -> Genotypes:
    """Return the canonical genotypes of archs, shape (N, G).

    Raises:
        UserError: naming the arch that is not in the space, and why.
    """
    genotypes = np.zeros((len(archs), len(space.genes)), dtype=np.int64)
    for row, arch in enumerate(archs):
        try:
            genotypes[row] = space.encode(arch)
        except UserError as error:
            raise UserError(f"arch {arch.id}: {error}") from None
    return genotypes


def counting(space: SearchSpace, genotypes: Genotypes) -> Mask:
    """Return which genes change what their network computes, shape (N, G).

    A gene counts when another of its choices, all else equal, would make another layer. The space
    itself is asked for that, so nothing here has to know what an operator takes.

    Args:
        space: the search space.
        genotypes: canonical, shape (N, G).
    """
    counts = np.ones(genotypes.shape, dtype=bool)
    halves: tuple[Half, ...] = (space.mixer_half, space.ffn_half)
    meanings = [_meanings(half) for half in halves]
    for slot in range(space.num_layers):
        active = space.indices(genotypes, f"layers.{slot}.skip") == 0
        before = [m[half.index(genotypes, slot)] for m, half in zip(meanings, halves, strict=True)]
        for column in space.slot_columns[slot]:
            name = list(space.genes)[column]
            if name.endswith(".skip"):
                continue
            changed = np.zeros(len(genotypes), dtype=bool)
            other = genotypes.copy()
            for choice in range(len(space.genes[name])):
                other[:, column] = choice
                for half, meaning, now in zip(halves, meanings, before, strict=True):
                    changed |= meaning[half.index(other, slot)] != now
            counts[:, column] = active & changed
    return counts


def _meanings(half: Half) -> NDArray[np.int64]:
    """Number what each combination of a half computes; equal numbers compute the same."""
    numbers: dict[tuple[Any, ...], int] = {}
    keys = [half.key(layer) for layer in half.layers]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _numbers(name: str, choices: Sequence[Any]) -> dict[str, FloatMatrix]:
    """Return the columns of a gene, each with its value at every choice."""
    if name.endswith(".heads"):
        pairs = np.array([[float(part) for part in choice.split("x")] for choice in choices])
        prefix = name.removesuffix("heads")
        return {f"{prefix}{part}": pairs[:, i] for i, part in enumerate(HEADS)}
    if all(isinstance(choice, int | float) for choice in choices):
        return {name: np.array(choices, dtype=np.float64)}
    return {name: np.arange(len(choices), dtype=np.float64)}


def _stacked(columns: Sequence[FloatMatrix], num_archs: int) -> FloatMatrix:
    return np.stack(columns, axis=1) if columns else np.zeros((num_archs, 0))
