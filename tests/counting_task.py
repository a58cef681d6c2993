"""What trainings are tested on: a small space, and counting as a task."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from searchspace.space import SearchSpace

VOCAB = 32
SPACE = {
    "name": "test",
    "d_model": [32, 16],
    "head_dim": 8,
    "num_layers": 2,
    "layers": {
        "heads": [[4, 2], [2, 1]],
        "position": ["rope"],
        "intermediate_size": [48, 16],
        "norm": ["rmsnorm", "layernorm"],
        "mixer": {"softmax": {}, "linear_elu": {}, "gla": {}},
    },
}


class CountingTask:
    """The next token is the last one plus one."""

    seq_len = 12

    def train_batch(
        self, step: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        first = torch.randint(0, VOCAB, (batch_size, 1), generator=generator)
        tokens = (first + torch.arange(self.seq_len + 1)) % VOCAB
        return tokens[:, :-1], tokens[:, 1:]


def make_space() -> SearchSpace:
    return SearchSpace.from_dict(SPACE, VOCAB)


def losses(folder: Path) -> list[dict[str, float]]:
    """Return the log of a training."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
