"""The prepared task: batches to learn from, windows to judge by, and what a loss is counted in.

Legend: B batch, T tokens of one window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.tasks.base import HeldOut, decoder_facts
from nas.tasks.config import TaskConfig
from nas.tasks.splits import SplitName
from nas.tasks.tokenizers import StreamDecoder, Tokenizer
from searchspace.errors import UserError


@dataclass(frozen=True)
class SplitSize:
    """How large one split is; for token files a unit is a token."""

    num_files: int
    num_tokens: int
    num_units: int


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a prepared task besides its tokens.

    Args:
        vocab_size: token ids are below it.
        unit: what losses are divided by: ``"byte"`` of text, or ``"token"`` of token files.
        split_rule: ``"files"`` (whole files held out) or ``"blocks"`` (each file cut in three).
        sizes: how large each split is.
        baselines: nats per unit of n-gram counts, by split (validation, test) and by name.
        num_skipped_files: files that could not be used.
        num_duplicate_files: files left out because another one has the same content.
        files_sha256: hash over names, splits and contents of the files used.
    """

    vocab_size: int
    unit: Literal["byte", "token"]
    split_rule: Literal["files", "blocks"]
    sizes: dict[SplitName, SplitSize]
    baselines: dict[SplitName, dict[str, float]]
    num_skipped_files: int
    num_duplicate_files: int
    files_sha256: str


class LanguageModelTask:
    """Causal language modelling on tokens that are prepared and divided.

    Nothing in it changes: a batch follows from (seed, step) alone, so training that was
    interrupted goes on with the very batches it would have seen.

    Args:
        config: what was asked for.
        facts: what was found.
        tokens: token ids of each split, uint16 or uint32, perhaps memory-mapped.
        tokenizer: None for token files.
    """

    metric_name: Literal["loss"] = "loss"

    def __init__(
        self,
        config: TaskConfig,
        facts: TaskFacts,
        tokens: Mapping[SplitName, NDArray[Any]],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config = config
        self.facts = facts
        self.tokenizer = tokenizer
        self.vocab_size = facts.vocab_size
        self.seq_len = config.seq_len
        self.unit = facts.unit
        self.family_facts = decoder_facts(config.seq_len)
        self._tokens = tokens

    @property
    def baselines(self) -> dict[str, float]:
        """n-gram cross-entropy on the test split, in nats per unit; see `TaskFacts.baselines`."""
        return self.facts.baselines["test"]

    @property
    def train_tokens(self) -> Tensor:
        """All training token ids, uint16 or uint32, 1-d."""
        return torch.from_numpy(self._tokens["train"])

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the training batch of one step.

        Windows are drawn without replacement: an epoch shuffles all of them, and the next one
        shuffles windows that start at another offset.

        Args:
            step: counted from 0.
            batch_size: B; keep it the same from step to step, or windows repeat early.
            seed: of this training.

        Returns:
            inputs_BT and targets_BT, int64; a target is the token after its input.
        """
        tokens = self._tokens["train"]
        first = step * batch_size
        starts = [
            _window_start(seed, index, len(tokens), self.seq_len)
            for index in range(first, first + batch_size)
        ]
        return self._windows(tokens, np.array(starts))

    def evaluation_batches(
        self, split: HeldOut, amount: int, batch_size: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return windows that never overlap and are spread evenly over a held-out split.

        Args:
            split: which part.
            amount: how many targets in all; rounded down to whole windows, at least one and
                at most what the split holds.
            batch_size: B; the last batch may be smaller.

        Returns:
            (inputs_BT, targets_BT), int64; the same for the same arguments.
        """
        tokens = self._tokens[split]
        room = len(tokens) - 1 - self.seq_len
        num_windows = max(1, min(amount, len(tokens) - 1) // self.seq_len)
        starts = np.arange(num_windows) * room // max(1, num_windows - 1)
        return [
            self._windows(tokens, starts[first : first + batch_size])
            for first in range(0, num_windows, batch_size)
        ]

    def units_of(self, targets: Tensor) -> int:
        """Return how many bytes of text (or tokens) the targets stand for.

        A loss in nats per byte is the sum over *all* targets, end-of-text included, divided by
        this. End-of-text stands for no byte, so where documents end is paid for and never
        flatters the figure; the n-gram baselines are counted the same way.

        Args:
            targets: token ids of any shape, int64.
        """
        if self.unit == "token":
            return targets.numel()
        return int(self._token_units[targets.cpu()].sum())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            UserError: the task has token files and so no text.
        """
        return self._text_tokenizer().encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: the task has token files and so no text.
        """
        return self._text_tokenizer().decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that is given token ids one by one.

        Raises:
            UserError: the task has token files and so no text.
        """
        return StreamDecoder(self._text_tokenizer())

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "this task was prepared from .bin token files and has no tokenizer; use the one "
                "that wrote them"
            )
        return self.tokenizer

    @cached_property
    def _token_units(self) -> Tensor:
        return torch.tensor([len(token) for token in self._text_tokenizer().token_bytes])

    def _windows(self, tokens: NDArray[Any], starts: NDArray[Any]) -> tuple[Tensor, Tensor]:
        index = starts[:, None] + np.arange(self.seq_len + 1)
        windows = torch.from_numpy(tokens[index].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _window_start(seed: int, index: int, num_tokens: int, seq_len: int) -> int:
    """Return where the training window of a running number starts."""
    num_windows = (num_tokens - 1) // seq_len
    # One window fewer leaves the offset a whole window to vary in.
    num_windows = max(1, num_windows - 1)
    room = num_tokens - 1 - num_windows * seq_len
    epoch, place = divmod(index, num_windows)
    offset, order = _epoch(seed, epoch, num_windows, room)
    return offset + int(order[place]) * seq_len


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_windows: int, room: int) -> tuple[int, NDArray[np.int64]]:
    """Return the offset of an epoch's windows and their order; follows from the arguments only."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(room + 1)), rng.permutation(num_windows)
