"""The reader of HW-GPT-Bench: on a small made-up surrogate, and on the real one where it is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from predictors.benchmarks.hwgpt import MLP_RATIOS, HwGptSpace
from searchspace.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Random surrogates of a width of 7 in the file's form."""
    rng = np.random.default_rng(0)
    arrays = {}
    for net, width_in in (("perplexity", 3 + 3 + 72 + 2), ("bf16_memory", 2 + 24 + 1)):
        widths = [width_in, 7, 7, 7, 7, 1]
        for k in range(1, 6):
            shape = (widths[k], widths[k - 1])
            arrays[f"{net}/fc{k}.weight"] = rng.normal(size=shape) / np.sqrt(shape[1])
            arrays[f"{net}/fc{k}.bias"] = 0.1 * rng.normal(size=widths[k])
    np.savez(tmp_path / "hwgpt_s.npz", **arrays)
    return tmp_path


def slow_network(space: HwGptSpace, net: str, x: np.ndarray) -> float:
    for k in range(1, 6):
        weight, bias = space.weights[f"{net}/fc{k}.weight"], space.weights[f"{net}/fc{k}.bias"]
        out = []
        for row, offset in zip(weight, bias, strict=True):
            value = float(sum(w * v for w, v in zip(row, x, strict=True)) + offset)
            out.append(max(value, 0.0) if k < 5 else value)
        x = np.array(out)
    return float(x[0])


def test_surrogates_equal_a_walk_through_each_layer_of_each_network(folder: Path) -> None:
    space = HwGptSpace.load(folder, "s")
    X = space.sample(np.random.default_rng(1), 12)
    for row, perplexity, memory in zip(
        X, space.perplexity(X), space.bf16_memory_mb(X), strict=True
    ):
        depth = space.scale.num_layers[row[1]]
        one_hot = [*np.eye(3)[row[0]], *np.eye(3)[row[1]]]
        for genes in (row[3:15], row[15:]):
            for i, gene in enumerate(genes):
                one_hot += list(np.eye(3)[gene]) if i < depth else [0.0] * 3
        one_hot += [row[2] == 0, row[2] == 1]
        assert perplexity == pytest.approx(slow_network(space, "perplexity", np.array(one_hot)))
        unit = [(space.scale.embed[row[0]] - 192) / (768 - 192), (depth - 10) / 2]
        for genes in (row[3:15], row[15:]):
            unit += [gene / 2 if i < depth else -1.0 for i, gene in enumerate(genes)]
        unit += [float(row[2] == 0)]
        assert memory == pytest.approx(slow_network(space, "bf16_memory", np.array(unit)))


def test_parameters_equal_a_count_matrix_by_matrix(folder: Path) -> None:
    space = HwGptSpace.load(folder, "s")
    X = space.sample(np.random.default_rng(2), 20)
    for row, counted in zip(X, space.num_params(X), strict=True):
        e, depth, bias = space.scale.embed[row[0]], space.scale.num_layers[row[1]], row[2] == 0
        total = 2 * 50254 * e + 2 * e
        for i in range(depth):
            inner = MLP_RATIOS[row[3 + i]] * e
            attention = 64 * space.scale.num_heads[row[15 + i]]
            total += 4 * e
            total += 3 * e * attention + (3 * attention if bias else 0)
            total += attention * e + (e if bias else 0)
            total += 3 * e * inner + (2 * inner + e if bias else 0)
        assert counted == total


def test_inactive_genes_count_for_nothing(folder: Path) -> None:
    space = HwGptSpace.load(folder, "s")
    rng = np.random.default_rng(3)
    X = space.sample(rng, 40)
    scrambled = X.copy()
    noise = rng.integers(0, 3, X[:, 3:].shape)
    scrambled[:, 3:] = np.where(np.tile(space.active(X), 2), X[:, 3:], noise)
    assert (scrambled != X).any()
    np.testing.assert_array_equal(space.canonical(scrambled), X)
    for values in (space.perplexity, space.bf16_memory_mb, space.num_params, space.one_hot):
        np.testing.assert_array_equal(values(scrambled), values(X))
    np.testing.assert_array_equal(space.masked(scrambled), space.masked(X))
    assert np.isnan(space.masked(X)).sum() == (~space.active(X)).sum() * 2
    assert sorted(np.unique(X[:, 0])) == [0, 1, 2]


def test_unknown_space_and_absent_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of m, s"):
        HwGptSpace.load(tmp_path, "xl")
    with pytest.raises(UserError, match=r"give the folder that holds hwgpt_m\.npz"):
        HwGptSpace.load(tmp_path, "m")


@pytest.mark.parametrize("name", ["s", "m"])
def test_real_surrogates_give_the_stored_values(name: str) -> None:
    if "HWNAS_DATA" not in os.environ:
        pytest.skip("HWNAS_DATA is not set: the public benchmark is not here")
    folder = Path(os.environ["HWNAS_DATA"]) / "hwgpt"
    space, check = HwGptSpace.load(folder, name), np.load(folder / f"check_{name}.npz")
    X = check["X"].astype(np.int64)
    np.testing.assert_allclose(space.perplexity(X), check["perplexity"], rtol=1e-5)
    np.testing.assert_allclose(space.bf16_memory_mb(X), check["bf16_memory_mb"], rtol=1e-5)
    np.testing.assert_array_equal(space.num_params(X), check["params_llama"])
