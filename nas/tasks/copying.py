"""`copy`: repeat a random string. A network of fixed state fails beyond what its state can hold.

Source: Jelassi et al. 2024, "Repeat After Me: Transformers are Better than State Space Models at
Copying", section 3 (uniformly random strings of varying length; only the copy counts).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nas.tasks.base import Progress
from nas.tasks.config import TaskConfig
from nas.tasks.probes import Ints, ProbeTask, Text


class Copy:
    """Strings over symbols 0 to ``num_symbols - 1``."""

    tokens_per_item = 1

    def __init__(self, num_symbols: int) -> None:
        self.vocab_size = num_symbols

    def draw(self, rng: np.random.Generator, num_items_B: Ints, longest: int) -> Text:
        """See `nas.tasks.probes.Probe.draw`."""
        strings = rng.integers(0, self.vocab_size, (len(num_items_B), longest))
        return Text(strings, strings, np.ones(longest, np.bool_))


def prepare(config: TaskConfig, folder: Path, progress: Progress) -> ProbeTask:
    """Return the task; nothing is written. See `nas.tasks.prepare_task`."""
    return ProbeTask(config, Copy(config.number("num_symbols")))
