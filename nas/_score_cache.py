"""Scores that a run folder keeps, so that an interrupted `nas score` goes on."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from searchspace.errors import UserError
from searchspace.files import read_json, write_json

FILE = "scores.json"
SECONDS_BETWEEN_WRITES = 2.0


class ScoreCache:
    """Values of training-free metrics by metric, seed, batch and arch.

    Args:
        path: the JSON file; None keeps nothing.
        batch: inputs and targets that metrics are computed on.
        seed: of the weights.

    Raises:
        UserError: when the file is there but is none of scores.
    """

    def __init__(self, path: Path | None, batch: tuple[Tensor, Tensor], seed: int) -> None:
        self._path = path
        self._key = f"batch {_digest(batch)}, seed {seed}"
        self._scores: dict[str, dict[str, float]] = self._stored().get(self._key, {})
        self._written = time.monotonic()

    def get(self, metric: str, arch_id: str) -> float | None:
        """Return a score; None when it is not known yet."""
        return self._scores.get(metric, {}).get(arch_id)

    def put(self, arch_id: str, values: Mapping[str, float]) -> None:
        """Keep the finite scores of an arch by metric, and write them now and then."""
        for metric, value in values.items():
            if math.isfinite(value):
                self._scores.setdefault(metric, {})[arch_id] = value
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write everything, and keep what others have written meanwhile."""
        if self._path is None or not self._scores:
            return
        stored = self._stored()
        mine = stored.setdefault(self._key, {})
        for metric, values in self._scores.items():
            mine[metric] = {**mine.get(metric, {}), **values}
        write_json(self._path, stored)
        self._written = time.monotonic()

    def _stored(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        stored = read_json(self._path, "file of scores")
        if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
            raise UserError(f"{self._path} is not a file of scores; remove it to start anew")
        return stored


def _digest(batch: tuple[Tensor, Tensor]) -> str:
    content = hashlib.sha256()
    for tensor in batch:
        content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:10]
