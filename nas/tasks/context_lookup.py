"""`context_lookup`: pairs of key and value are shown, then every key is asked for its value.

Keys of one sequence are all different; they are asked in a new random order. Once asked, the right
value follows its key, so all questions of a sequence are answered in one pass.

Source: Jelassi et al. 2024, "Repeat After Me", section 4 (phone-book look-up in the context); Arora
et al. 2024, "Zoology" (multi-query associative recall: many questions per sequence).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nas.tasks.base import Progress
from nas.tasks.config import TaskConfig
from nas.tasks.probes import Ints, ProbeTask, Text


class ContextLookup:
    """Keys are symbols below ``num_symbols``, values the ``num_symbols`` behind them."""

    tokens_per_item = 2

    def __init__(self, num_symbols: int) -> None:
        self.num_symbols = num_symbols
        self.vocab_size = 2 * num_symbols

    def draw(self, rng: np.random.Generator, num_items_B: Ints, longest: int) -> Text:
        """See `nas.tasks.probes.Probe.draw`."""
        num_rows = len(num_items_B)
        keys = rng.random((num_rows, self.num_symbols)).argsort(axis=1)[:, :longest]
        values = rng.integers(self.num_symbols, self.vocab_size, (num_rows, longest))
        # Pairs that a shorter row does not show stay behind the others.
        is_shown = np.arange(longest) < num_items_B[:, None]
        order = np.where(is_shown, rng.random((num_rows, longest)), 2.0).argsort(axis=1)
        asked = (np.take_along_axis(part, order, axis=1) for part in (keys, values))
        return Text(
            np.stack((keys, values), axis=2).reshape(num_rows, -1),
            np.stack(tuple(asked), axis=2).reshape(num_rows, -1),
            np.arange(2 * longest) % 2 == 1,
        )


def prepare(config: TaskConfig, folder: Path, progress: Progress) -> ProbeTask:
    """Return the task; nothing is written. See `nas.tasks.prepare_task`."""
    return ProbeTask(config, ContextLookup(config.number("num_symbols")))
