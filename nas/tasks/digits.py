"""Handwritten digits of 8x8 pixels, from scikit-learn's own files.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from nas.tasks.base import Progress
from nas.tasks.config import TaskConfig
from nas.tasks.input_forms import Picture
from nas.tasks.labelled import Examples, LabelledFacts, LabelledTask
from nas.tasks.splits import SplitName

NUM_HELD_OUT = 30
"""Images of each class in the validation split, and in the test split; the others are learnt."""
WHITE = 16
"""A pixel counts the dots of ink in a block of 4x4 dots of the scan."""


def prepare(config: TaskConfig, folder: Path, progress: Progress) -> LabelledTask:
    """Return the digits; nothing is written. See `nas.tasks.prepare_task`.

    Images are (B, 1, 8, 8), float32, with mean 0 and variance 1 over the training split. The split
    follows from a hash of the pixels, so that it is the same everywhere.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows: dict[SplitName, list[int]] = {"train": [], "validation": [], "test": []}
    for label in range(10):
        of_class = np.flatnonzero(labels == label).tolist()
        order = sorted(of_class, key=lambda row: _digest(pixels[row]))
        rows["test"] += order[:NUM_HELD_OUT]
        rows["validation"] += order[NUM_HELD_OUT : 2 * NUM_HELD_OUT]
        rows["train"] += order[2 * NUM_HELD_OUT :]
    for part in rows.values():
        part.sort(key=lambda row: _digest(pixels[row]))  # mixes the classes
    learnt = pixels[rows["train"]]
    form = Picture(8, 1, WHITE, float(learnt.mean()), float(learnt.std()))
    images = form.scaled(pixels).reshape(-1, 1, 8, 8)
    facts = LabelledFacts(
        {"kind": "vit", "num_classes": 10, "image_size": 8, "channels": 1},
        vocab_size=0,
        seq_len=1,
        labels=tuple("0123456789"),
    )
    classes = labels.astype(np.int64)
    examples = {split: Examples(images[part], classes[part]) for split, part in rows.items()}
    return LabelledTask(facts, examples, form)


def _digest(pixels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bytes:
    return hashlib.sha256(pixels.astype(np.uint8).tobytes()).digest()
