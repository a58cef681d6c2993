"""Labelled files and digits: splits, batches, and what is said about bad input."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.tasks import TaskConfig, prepare_task
from nas.tasks.labelled import Examples, LabelledFacts, LabelledTask
from nas.tasks.splits import SPLITS
from nas.tasks.text_rows import PAD
from searchspace.errors import UserError


def write_classes(root: Path, **num_files: int) -> Path:
    for label, number in num_files.items():
        for index in range(number):
            path = root / label / f"part{index % 2}" / f"{index}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{index} é {label} " * (1 + index % 3), encoding="utf-8")
    return root


def config_of(data: Path | str, **changes: Any) -> TaskConfig:
    config = TaskConfig(
        "text_classification", data=str(data), seq_len=20,
        validation_fraction=0.1, test_fraction=0.2,
    )  # fmt: skip
    return replace(config, **changes)


def labelled(config: TaskConfig, folder: Path, messages: list[str] | None = None) -> LabelledTask:
    task = prepare_task(config, folder, (messages if messages is not None else []).append)
    assert isinstance(task, LabelledTask)
    return task


def texts(examples: Examples) -> dict[bytes, int]:
    rows = ([int(token) for token in row if token != PAD] for row in examples.inputs)
    return dict(zip(map(bytes, rows), examples.labels.tolist(), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data"), spam=40, ham=10, eggs=3)


def test_every_split_has_every_class_and_no_file_is_in_two(data: Path, tmp_path: Path) -> None:
    task = labelled(config_of(data), tmp_path)
    assert task.labels == ("eggs", "ham", "spam")
    counts = {s: np.bincount(task.examples[s].labels).tolist() for s in SPLITS}
    assert counts == {"train": [1, 7, 28], "validation": [1, 1, 4], "test": [1, 2, 8]}
    everything = [text for split in SPLITS for text in texts(task.examples[split])]
    assert len(everything) == len(set(everything)) == 53
    expected = {
        path.read_bytes()[:20]: task.labels.index(path.relative_to(data).parts[0])
        for path in data.rglob("*.txt")
    }
    found = {t: c for split in SPLITS for t, c in texts(task.examples[split]).items()}
    assert found == expected


def test_facts_and_batches(data: Path, tmp_path: Path) -> None:
    task = labelled(config_of(data), tmp_path)
    facts = {"kind": "encoder", "num_classes": 3, "max_tokens": 20, "pad_token": 256}
    assert task.family_facts == facts
    assert (task.vocab_size, task.seq_len, task.unit) == (257, 20, "example")
    assert task.metric_name == "accuracy"
    inputs, targets = task.train_batch(7, 5, seed=3)
    assert inputs.shape == (5, 20) and targets.shape == (5,)
    assert inputs.dtype == targets.dtype == torch.int64
    assert task.units_of(targets) == 5
    shown = torch.cat([task.train_batch(step, 6, seed=0)[0] for step in range(6)])
    assert len({tuple(row.tolist()) for row in shown}) == 36  # one epoch, every file once
    assert task.baselines["uniform"] == pytest.approx(math.log(3))
    shares = np.array([2, 8, 29]) / 39
    expected = -(np.log(shares) * [1, 2, 8]).sum() / 11
    assert task.baselines["class frequency"] == pytest.approx(expected)
    assert task.majority_accuracy == pytest.approx(8 / 11)


def test_reopened_task_goes_on_with_the_same_batches(data: Path, tmp_path: Path) -> None:
    copy = write_classes(tmp_path / "data", spam=9, ham=9)
    first = labelled(config_of(copy), tmp_path / "task")
    expected = first.train_batch(7, 5, seed=3)
    for step in (9, 2, 1000):
        first.train_batch(step, 5, seed=3)
    for path in copy.rglob("*.txt"):
        path.write_text("changed since")
    again = labelled(config_of(copy), tmp_path / "task")
    for found, wanted in zip(again.train_batch(7, 5, seed=3), expected, strict=True):
        assert torch.equal(found, wanted)
    assert again.facts == first.facts
    assert not torch.equal(again.train_batch(7, 5, seed=4)[0], expected[0])
    with pytest.raises(UserError, match="prepared with seq_len=20, but seq_len=21"):
        prepare_task(config_of(copy, seq_len=21), tmp_path / "task")


def test_seed_draws_training_files_but_not_held_out_ones(data: Path, tmp_path: Path) -> None:
    first, second = (
        labelled(config_of(data, seed=seed, max_train_bytes=500), tmp_path / str(seed))
        for seed in (0, 2)
    )
    for split in ("validation", "test"):
        assert texts(first.examples[split]) == texts(second.examples[split])
    assert texts(first.examples["train"]).keys() != texts(second.examples["train"]).keys()
    assert 400 < sum(map(len, texts(first.examples["train"]))) <= 500


def test_files_with_the_same_beginning_count_once(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", a=5, b=5)
    for index in range(4):
        (data / "b" / f"licence{index}").write_text("All rights reserved." + str(index))
    messages: list[str] = []
    task = labelled(config_of(data), tmp_path / "task", messages)
    assert sum(len(task.examples[split].labels) for split in SPLITS) == 11
    assert "left out 3 files whose first 20 bytes are those of another file" in messages


def test_files_that_are_not_text_are_skipped(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", a=5, b=5)
    (data / "a" / "picture").write_bytes(b"\x89PNG\0")
    (data / "a" / "empty").touch()
    (data / "a" / ".hidden").write_text("not seen")
    (data / "outside.txt").write_text("no class")
    messages: list[str] = []
    task = labelled(config_of(data), tmp_path / "task", messages)
    assert sum(len(task.examples[split].labels) for split in SPLITS) == 10
    assert "skipped 1 files that are not UTF-8 text" in messages


def test_characters_may_be_cut(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for label, letter in (("a", "é"), ("b", "€")):
        (data / label).mkdir(parents=True)
        for index in range(3):
            (data / label / str(index)).write_text(str(index) + letter * 6000, encoding="utf-8")
    task = labelled(config_of(data, seq_len=5000), tmp_path / "task")
    assert all((task.examples[split].inputs != PAD).all() for split in SPLITS)


def refused(tmp_path: Path, config: TaskConfig) -> str:
    with pytest.raises(UserError) as caught:
        prepare_task(config, tmp_path / "out" / "task")
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


def test_not_a_folder_of_classes(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path, config_of(tmp_path / "none"))
    (tmp_path / "file").write_text("text")
    assert "is not a folder" in refused(tmp_path, config_of(tmp_path / "file"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no sub-folder; give a folder with at least two" in refused(
        tmp_path, config_of(empty)
    )
    one = write_classes(tmp_path / "one", only=9)
    (one / ".git").mkdir()
    assert "has only one sub-folder, only; give" in refused(tmp_path, config_of(one))


def test_too_few_files(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", a=9, b=9)
    (data / "c").mkdir()
    assert "c holds no file with text in it; add at least 3" in refused(tmp_path, config_of(data))
    write_classes(data, c=2)
    (data / "c" / "x.bin").write_bytes(b"\0")
    message = refused(tmp_path, config_of(data))
    assert message.startswith("class 'c' has 3 files, of which 2 are different UTF-8 texts")
    assert "x.bin is not text (NUL byte at offset 0)" in message


def test_too_few_training_bytes(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", a=9, b=9)
    message = refused(tmp_path, config_of(data, max_train_bytes=20))
    assert message.startswith("max_train_bytes=20 leaves no training file of class")


def test_full_disk_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_synced = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal num_synced
        num_synced += 1
        if num_synced > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr("searchspace.files.os.fsync", fsync)
    with pytest.raises(UserError, match="No space left on device; choose another folder"):
        prepare_task(config_of(data), tmp_path / "task")
    assert list((tmp_path / "task").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "task=text_classification needs data; give a folder with one sub-folder"),
        ({"tokenizer": "bytes"}, "tokenizer='bytes' was given with task=text_classification"),
        ({"seq_len": 0}, "seq_len=0 is too small"),
    ],
)
def test_bad_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskConfig("text_classification", **{"data": "x", **changes})


# Digits


def test_digits(tmp_path: Path) -> None:
    task = labelled(TaskConfig("digits"), tmp_path / "task")
    assert not (tmp_path / "task").exists()
    facts = {"kind": "vit", "num_classes": 10, "image_size": 8, "channels": 1}
    assert task.family_facts == facts and task.vocab_size == 0
    assert [len(task.examples[split].labels) for split in SPLITS] == [1197, 300, 300]
    images = task.examples["train"].inputs
    assert images.mean() == pytest.approx(0.0, abs=1e-6)
    assert images.std() == pytest.approx(1.0, abs=1e-6)
    for split in ("validation", "test"):
        assert np.bincount(task.examples[split].labels).tolist() == [30] * 10
    contents = [image.tobytes() for split in SPLITS for image in task.examples[split].inputs]
    assert len(set(contents)) == 1797
    (_, few), *_ = task.evaluation_batches("test", 50, 50)
    assert len(set(few.tolist())) == 10
    inputs, targets = task.train_batch(0, 6, seed=1)
    assert inputs.shape == (6, 1, 8, 8) and inputs.dtype == torch.float32
    assert targets.shape == (6,) and targets.dtype == torch.int64
    other = labelled(TaskConfig("digits"), tmp_path)
    assert torch.equal(other.train_batch(0, 6, seed=1)[0], inputs)


def test_digits_keep_image_and_label_together(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # Scaling is increasing, so each image is told by the order of its pixel values.
    levels = {tuple(np.unique(p, return_inverse=True)[1]): int(c)
              for p, c in zip(pixels, labels, strict=True)}  # fmt: skip
    task = labelled(TaskConfig("digits"), tmp_path)
    for split in SPLITS:
        part = task.examples[split]
        for image, label in zip(part.inputs, part.labels, strict=True):
            assert levels[tuple(np.unique(image.ravel(), return_inverse=True)[1])] == label


def test_digits_have_no_parameters() -> None:
    with pytest.raises(UserError, match=r"seed=3 was given with task=digits.*has no parameters"):
        TaskConfig("digits", seed=3)


# Batches of any classification task


def numbered_task(num_examples: int) -> LabelledTask:
    """A task whose examples are their own numbers."""
    rows = np.arange(num_examples)
    facts = LabelledFacts({}, 1000, 1, tuple(map(str, range(num_examples))))
    return LabelledTask(facts, dict.fromkeys(SPLITS, Examples(rows[:, None].astype("u2"), rows)))


@pytest.mark.parametrize(("size", "wanted"), [(1, 1), (7, 3), (100, 100), (100, 10**6), (99, 50)])
def test_evaluation_examples_are_different_and_spread(size: int, wanted: int) -> None:
    batches = numbered_task(size).evaluation_batches("test", wanted, batch_size=8)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(inputs[:, 0], targets)
    number = min(size, wanted)
    assert len(set(targets.tolist())) == len(targets) == number
    gaps = targets.diff()
    assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1
    assert int(targets[0]) == 0 and int(targets[-1]) >= size - math.ceil(size / number)
    assert all(len(batch) <= 8 for batch, _ in batches)


@pytest.mark.parametrize("size", [1, 7, 30])
def test_an_epoch_shows_every_example_once(size: int) -> None:
    task = numbered_task(size)
    epochs = torch.cat([task.train_batch(step, 3, seed=0)[1] for step in range(2 * size)])
    assert len(epochs) == 6 * size
    for epoch in epochs.split(size):
        assert sorted(epoch.tolist()) == list(range(size))
    assert size == 1 or not torch.equal(epochs[:size], epochs[size : 2 * size])
