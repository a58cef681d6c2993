"""ListOps: expressions obey the rules, their values are right, and the splits are disjoint."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.tasks import TaskConfig, prepare_task
from nas.tasks.expressions import PAD, TOKENS, Rules, grow
from nas.tasks.labelled import LabelledTask
from nas.tasks.listops import NUM_HELD_OUT, generate
from searchspace.errors import UserError

SMALL = Rules(min_length=5, max_length=60, max_depth=5, max_args=5)


def words(row: Any) -> list[str]:
    ids = row.tolist()
    length = ids.index(PAD) if PAD in ids else len(ids)
    assert set(ids[length:]) <= {PAD}
    return [TOKENS[index] for index in ids[:length]]


def naive_value(tokens: list[str]) -> tuple[int, int, list[int]]:
    """Read one expression with a stack: its value, its depth, and the argument counts."""
    stack: list[tuple[str, list[int], int]] = []
    depth, counts = 1, []
    for place, token in enumerate(tokens):
        depth = max(depth, len(stack) + 1)
        if token.startswith("["):
            stack.append((token, [], place))
            continue
        value = int(token) if token != "]" else 0
        if token == "]":
            name, args, _ = stack.pop()
            counts.append(len(args))
            if name == "[MIN":
                value = min(args)
            elif name == "[MAX":
                value = max(args)
            elif name == "[MED":
                value = int(statistics.median(args))
            else:
                value = sum(args) % 10
        if not stack:
            assert place == len(tokens) - 1
            return value, depth, counts
        stack[-1][1].append(value)
    raise AssertionError("an operator is not closed")


@pytest.mark.parametrize(
    "rules", [SMALL, Rules(1, 9, 2, 7), Rules(1, 400, 10, 10), Rules(50, 300, 12, 7)]
)
def test_values_are_those_of_a_naive_reader(rules: Rules) -> None:
    tokens, values = grow(rules, np.random.default_rng(0), 3000)
    assert len(tokens) == len(values) > 20
    assert tokens.shape[1] == rules.max_length
    for row, value in zip(tokens, values, strict=True):
        expression = words(row)
        assert rules.min_length <= len(expression) <= rules.max_length
        found, depth, counts = naive_value(expression)
        assert found == value
        assert depth <= rules.max_depth
        assert all(2 <= count <= rules.max_args for count in counts)


def test_shares_are_the_published_ones() -> None:
    # Nothing is too long here, so what is kept is what was drawn.
    rules = Rules(min_length=1, max_length=2 + 4 * (2 + 4), max_depth=3, max_args=4)
    tokens, values = grow(rules, np.random.default_rng(1), 40_000)
    assert len(tokens) == 40_000
    expressions = [words(row) for row in tokens]
    is_operator = [expression[0].startswith("[") for expression in expressions]
    assert np.mean(is_operator) == pytest.approx(0.25, abs=0.01)
    operators = Counter(e[0] for e in expressions if len(e) > 1)
    assert all(n / sum(operators.values()) == pytest.approx(0.25, abs=0.02)
               for n in operators.values())  # fmt: skip
    digits = Counter(e[0] for e in expressions if len(e) == 1)
    assert len(digits) == 10
    assert all(n / sum(digits.values()) == pytest.approx(0.1, abs=0.01) for n in digits.values())
    # The root's arguments: the count closed last.
    roots = Counter(naive_value(e)[2][-1] for e in expressions if len(e) > 1)
    assert set(roots) == {2, 3, 4}
    assert all(n / sum(roots.values()) == pytest.approx(1 / 3, abs=0.02) for n in roots.values())
    assert values.min() == 0 and values.max() == 9


def test_long_trees_are_dropped_and_do_not_fill_the_memory() -> None:
    tokens, _ = grow(Rules(1, 30, 100, 100), np.random.default_rng(0), 2000)
    lengths = (tokens != PAD).sum(axis=1)
    # A tree that grew too long must not come back as a short one: 1500 single digits, no more.
    assert 1400 < (lengths == 1).sum() < 1600
    assert set(np.unique(lengths)) - {1} <= set(range(4, 31))


def test_no_tree_of_a_wanted_length() -> None:
    tokens, values = grow(Rules(2, 3, 3, 3), np.random.default_rng(0), 100)
    assert tokens.shape == (0, 3) and values.shape == (0,)


def test_splits_are_disjoint_and_held_out_ones_do_not_depend_on_the_seed() -> None:
    first, again, other = (generate(SMALL, 3000, seed) for seed in (0, 0, 1))
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(first[split].inputs, again[split].inputs)
        np.testing.assert_array_equal(first[split].labels, again[split].labels)
    for split in ("validation", "test"):
        np.testing.assert_array_equal(first[split].inputs, other[split].inputs)
        assert len(first[split].labels) == NUM_HELD_OUT
    assert not np.array_equal(first["train"].inputs, other["train"].inputs)
    for task in (first, other):
        contents = [row.tobytes() for part in task.values() for row in part.inputs]
        assert len(contents) == len(set(contents)) == 3000 + 2 * NUM_HELD_OUT


def test_more_than_there_are() -> None:
    with pytest.raises(UserError, match=r"only \d+ of 2000 different .* 1 to 4 tokens .* ask for"):
        generate(Rules(1, 4, 2, 2), 10, 0)


@pytest.fixture(scope="module")
def config() -> TaskConfig:
    return TaskConfig(
        "listops", num_examples=1000, min_length=5, max_length=60, max_depth=5, max_args=5
    )


@pytest.fixture(scope="module")
def run(config: TaskConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "task"
    prepare_task(config, folder)
    return folder


def test_prepared_task(config: TaskConfig, run: Path) -> None:
    written = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    task = prepare_task(config, run)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == written
    assert len(written) == 8
    assert isinstance(task, LabelledTask)
    assert (task.vocab_size, task.seq_len, task.unit) == (16, 60, "example")
    facts = {"kind": "encoder", "num_classes": 10, "max_tokens": 60, "pad_token": 15}
    assert task.family_facts == facts
    inputs, targets = task.train_batch(3, 8, seed=2)
    assert inputs.shape == (8, 60) and targets.shape == (8,)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, target in zip(inputs, targets, strict=True):
        assert naive_value(words(row))[0] == int(target)
    assert task.baselines["uniform"] == pytest.approx(math.log(10))
    counts = np.bincount(task.examples["train"].labels) + 1
    shares = (counts / counts.sum())[task.examples["test"].labels]
    assert task.baselines["class frequency"] == pytest.approx(-np.log(shares).mean())
    commonest = task.examples["test"].labels == counts.argmax()
    assert task.majority_accuracy == commonest.mean()


@pytest.mark.parametrize("name", ["task.json", "train_inputs.npy", "test_labels.npy"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_half_written_folder_is_built_again(
    config: TaskConfig, tmp_path: Path, name: str, damage: str
) -> None:
    batch = prepare_task(config, tmp_path).train_batch(0, 4, 0)[0]
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    assert torch.equal(prepare_task(config, tmp_path).train_batch(0, 4, 0)[0], batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_length": 600}, "min_length=600 is more than max_length=500; choose at most 500"),
        (
            {"max_depth": 2},
            r"no expression of max_depth=2 and max_args=10 has min_length=100 .* 12",
        ),
        ({"max_depth": 1}, "max_depth=1 is out of range; choose 2 to 100"),
        ({"max_args": 1}, "max_args=1 is out of range"),
        ({"num_examples": 0}, "num_examples=0 is out of range"),
        ({"seq_len": 99}, "seq_len=99 was given with task=listops, which does not use it"),
        ({"num_items": 9}, "num_items=9 was given with task=listops.*max_depth"),
        ({"data": "x"}, "data='x' was given with task=listops"),
    ],
)
def test_bad_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskConfig("listops", **changes)
