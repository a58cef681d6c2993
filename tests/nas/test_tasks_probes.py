"""`copy` and `context_lookup`: every answer is right, scored, and can be found in the context."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.tasks import IGNORED, TaskConfig, prepare_task
from nas.tasks.probes import MAX_SEQUENCES, ProbeTask
from searchspace.errors import UserError

COPY = TaskConfig("copy", num_items=9, num_symbols=5)
LOOKUP = TaskConfig("context_lookup", num_items=7, num_symbols=11)


def probe(config: TaskConfig, folder: Path) -> ProbeTask:
    task = prepare_task(config, folder / "task")
    assert isinstance(task, ProbeTask)
    assert not (folder / "task").exists()
    return task


def check_row(task: ProbeTask, tokens: list[int], targets: list[int]) -> tuple[list[int], ...]:
    """Return what is shown and what is asked; check the frame and that targets follow tokens."""
    assert len(tokens) == len(targets) and tokens[0] == task.bos
    middle = tokens.index(task.sep)
    shown = tokens[1:middle]
    # The last token of a longest row is only a target.
    row = [*tokens, targets[-1] if targets[-1] != IGNORED else task.pad]
    asked = row[middle + 1 : middle + 1 + len(shown)]
    assert set(row[middle + 1 + len(shown) :]) <= {task.pad}
    assert not {task.bos, task.sep, task.pad} & {*shown, *asked}
    for place, target in enumerate(targets):
        assert target in (IGNORED, row[place + 1])
    scored = [place + 1 for place, target in enumerate(targets) if target != IGNORED]
    return shown, asked, [place - middle - 1 for place in scored]


@pytest.mark.parametrize("num_items", [1, 2, 9])
def test_copy(tmp_path: Path, num_items: int) -> None:
    task = probe(replace(COPY, num_items=num_items), tmp_path)
    assert (task.vocab_size, task.seq_len, task.unit) == (8, 2 * num_items + 1, "token")
    lengths = set()
    for step in range(10):
        inputs, targets = task.train_batch(step, 16, seed=0)
        assert inputs.shape == targets.shape == (16, task.seq_len)
        assert inputs.dtype == targets.dtype == torch.int64
        for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
            shown, asked, scored = check_row(task, tokens, answers)
            assert shown == asked and max(shown) < 5
            assert scored == list(range(len(asked)))
            lengths.add(len(shown))
        assert task.units_of(targets) == int((targets >= 0).sum())
    assert lengths == set(range((num_items + 1) // 2, num_items + 1))


@pytest.mark.parametrize("num_items", [1, 2, 7, 11])
def test_context_lookup(tmp_path: Path, num_items: int) -> None:
    task = probe(replace(LOOKUP, num_items=num_items), tmp_path)
    assert (task.vocab_size, task.seq_len) == (25, 4 * num_items + 1)
    orders = set()
    for step in range(10):
        inputs, targets = task.train_batch(step, 16, seed=0)
        assert inputs.shape == targets.shape == (16, task.seq_len)
        for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
            shown, asked, scored = check_row(task, tokens, answers)
            values = dict(zip(shown[::2], shown[1::2], strict=True))
            assert len(values) == len(shown) // 2
            assert max(values) < 11 <= min(values.values()) and max(values.values()) < 22
            assert sorted(asked[::2]) == sorted(values)
            assert [values[key] for key in asked[::2]] == asked[1::2]
            assert scored == list(range(1, len(asked), 2))
            orders.add(asked == shown)
    assert orders == ({True} if num_items == 1 else {True, False}) or orders == {False}


@pytest.mark.parametrize("config", [COPY, LOOKUP], ids=lambda config: config.name)
def test_evaluation_at_another_length(config: TaskConfig, tmp_path: Path) -> None:
    task = probe(replace(config, evaluation_items=11), tmp_path)
    per_item = 1 if config.name == "copy" else 2
    batches = task.evaluation_batches("test", 60, batch_size=2)
    assert [len(inputs) for inputs, _ in batches] == [2, 2, 1]
    for inputs, targets in batches:
        assert inputs.shape[1] == 2 * per_item * 11 + 1
        assert task.units_of(targets) == 11 * len(inputs)
        for tokens, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
            shown, _, _ = check_row(task, tokens, answers)
            assert len(shown) == per_item * 11
    assert task.seq_len == probe(config, tmp_path).seq_len
    assert len(task.evaluation_batches("test", 1, 8)) == 1
    assert sum(len(i) for i, _ in task.evaluation_batches("test", 10**6, 512)) == MAX_SEQUENCES
    same, other = (evaluated(task, split) for split in ("test", "validation"))
    assert torch.equal(same, evaluated(task, "test")) and not torch.equal(same, other)


def evaluated(task: ProbeTask, split: Any) -> Tensor:
    return torch.cat([inputs for inputs, _ in task.evaluation_batches(split, 60, 4)])


@pytest.mark.parametrize("config", [COPY, LOOKUP], ids=lambda config: config.name)
def test_batches_follow_from_seed_and_step(config: TaskConfig, tmp_path: Path) -> None:
    task = probe(config, tmp_path)
    expected = task.train_batch(7, 5, seed=3)
    task.train_batch(2, 5, seed=3)
    for found, wanted in zip(probe(config, tmp_path).train_batch(7, 5, seed=3), expected,
                             strict=True):  # fmt: skip
        assert torch.equal(found, wanted)
    assert not torch.equal(task.train_batch(8, 5, seed=3)[0], expected[0])
    assert not torch.equal(task.train_batch(7, 5, seed=4)[0], expected[0])


def test_facts(tmp_path: Path) -> None:
    task = probe(COPY, tmp_path)
    assert task.family_facts == {} and task.metric_name == "accuracy"
    assert task.baselines == {"uniform": pytest.approx(math.log(5))}
    long = probe(replace(COPY, evaluation_items=600), tmp_path)
    assert long.family_facts == {"max_tokens": 1201}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "copy", "num_symbols": 1}, "num_symbols=1 is out of range; choose 2 to 4096"),
        ({"name": "copy", "num_items": 0}, "num_items=0 is out of range"),
        ({"name": "copy", "vocab_size": 300}, "vocab_size=300 was given with task=copy"),
        ({"name": "copy", "max_depth": 3}, "max_depth=3 was given with task=copy.*num_items"),
        (
            {"name": "context_lookup", "num_items": 65},
            "num_items=65 pairs need as many different keys, but num_symbols=64; raise",
        ),
        (
            {"name": "context_lookup", "evaluation_items": 65},
            "evaluation_items=65 pairs need as many different keys",
        ),
    ],
)
def test_bad_config(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskConfig(**values)
