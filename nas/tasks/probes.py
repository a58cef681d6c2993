"""What the probes share: a text is shown, then asked for; only the answers count.

A sequence is ``[BOS] shown [SEP] asked [PAD]...``. Training sequences have all lengths from half of
`num_items` up, so the distance from a question to its answer is not fixed and must be found from
the content; held-out sequences all have `evaluation_items`.

Legend: B batch, N tokens shown (and asked), T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.tasks.base import IGNORED, HeldOut, decoder_facts
from nas.tasks.config import TaskConfig

MAX_SEQUENCES = 4096
"""Held-out sequences at most; there is no end of them."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """What is shown and asked.

    Args:
        shown_BN: symbols, of which a row's first ``tokens_per_item * num_items`` count.
        asked_BN: what stands behind the separator, as long as what is shown.
        is_answer_N: which of the asked tokens are to be predicted.
    """

    shown_BN: Ints
    asked_BN: Ints
    is_answer_N: NDArray[np.bool_]


class Probe(Protocol):
    """How one probe draws its sequences."""

    tokens_per_item: int
    vocab_size: int

    def draw(self, rng: np.random.Generator, num_items_B: Ints, longest: int) -> Text:
        """Return texts of `longest` items; row b will show and ask its first ``num_items_B[b]``."""
        ...


class ProbeTask:
    """Causal prediction on sequences that are drawn as they are needed.

    Args:
        config: gives ``num_items``, ``evaluation_items`` and ``num_symbols``.
        probe: what is shown and asked.
    """

    unit: Literal["token"] = "token"
    metric_name: Literal["accuracy"] = "accuracy"

    def __init__(self, config: TaskConfig, probe: Probe) -> None:
        self._probe = probe
        self._num_items = config.number("num_items")
        self._evaluation_items = config.number("evaluation_items")
        self._num_symbols = config.number("num_symbols")
        self.bos, self.sep, self.pad = range(probe.vocab_size, probe.vocab_size + 3)
        self.vocab_size = self.pad + 1
        self.seq_len = self._length(self._num_items)
        self.family_facts = decoder_facts(max(self.seq_len, self._length(self._evaluation_items)))

    @property
    def baselines(self) -> dict[str, float]:
        """Nats per answer of guessing every symbol alike."""
        return {"uniform": math.log(self._num_symbols)}

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs_BT and targets_BT, int64, of one step; never the same sequences again.

        Args:
            step: counted from 0.
            batch_size: B.
            seed: of this training.
        """
        rng = np.random.default_rng([2, seed, step])
        most = self._num_items
        return self._sequences(rng, rng.integers((most + 1) // 2, most + 1, batch_size), most)

    def evaluation_batches(
        self, split: HeldOut, amount: int, batch_size: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return sequences of ``evaluation_items``.

        Args:
            split: which part; the two are drawn independently.
            amount: how many answers; rounded down to whole sequences, 1 to `MAX_SEQUENCES`.
            batch_size: B; the last batch may be smaller.
        """
        number = max(1, min(amount // self._evaluation_items, MAX_SEQUENCES))
        rng = np.random.default_rng([("validation", "test").index(split)])
        most = self._evaluation_items
        inputs, targets = self._sequences(rng, np.full(number, most), most)
        return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))

    def units_of(self, targets: Tensor) -> int:
        """Return the number of answers among the targets (B, T)."""
        return int((targets != IGNORED).sum())

    def _length(self, num_items: int) -> int:
        return 1 + 2 * self._probe.tokens_per_item * num_items

    def _sequences(
        self, rng: np.random.Generator, num_items_B: Ints, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T), T as long as `longest` items need."""
        text = self._probe.draw(rng, num_items_B, longest)
        shown_B1 = self._probe.tokens_per_item * num_items_B[:, None]
        num_rows, num_shown = text.shown_BN.shape
        place = np.arange(2 * num_shown + 2)[None]
        asked_place = place - shown_B1 - 2
        is_asked = (asked_place >= 0) & (asked_place < shown_B1)
        within = np.clip(asked_place, 0, num_shown - 1)
        tokens = np.full((num_rows, 2 * num_shown + 2), self.pad)
        tokens[:, 0] = self.bos
        tokens[:, 1 : 1 + num_shown] = text.shown_BN
        tokens = np.where(place <= shown_B1, tokens, self.pad)
        np.put_along_axis(tokens, shown_B1 + 1, self.sep, axis=1)
        tokens = np.where(is_asked, np.take_along_axis(text.asked_BN, within, axis=1), tokens)
        scored = np.where(is_asked & text.is_answer_N[within], tokens, IGNORED)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(scored[:, 1:].copy())
