"""Losses of a supernet's networks, each computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas.calibration import calibrated_view
from nas.evaluation import evaluation_amount, held_out_loss
from nas.pipeline import Pipeline
from nas.training import read_state
from searchspace.arch import Arch
from searchspace.files import read_json, write_json


class Losses:
    """Losses of archs, each computed once and kept in a file.

    Args:
        evaluate: the loss of an arch.
        path: JSON file; None keeps them in memory only.
        stamp: what the losses depend on; a file with another stamp is not used.
    """

    def __init__(
        self, evaluate: Callable[[Arch], float], path: Path | None = None, stamp: Any = None
    ) -> None:
        self._evaluate, self._path, self._stamp = evaluate, path, stamp
        self.known: dict[str, float] = {}
        if path is not None and path.exists():
            stored = read_json(path, "losses")
            self.known = stored["losses"] if stored["stamp"] == stamp else {}

    def __call__(self, arch: Arch) -> float:
        """Return the loss of an arch."""
        if arch.id not in self.known:
            self.known[arch.id] = self._evaluate(arch)
            if self._path is not None and len(self.known) % 10 == 0:
                self.save()
        return self.known[arch.id]

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            write_json(self._path, {"stamp": self._stamp, "losses": self.known})


def inherited_losses(pipeline: Pipeline, num_tokens: int, name: str) -> Losses:
    """Return the losses of a run's networks on held-out data, kept in the run's file `name`."""
    task, supernet = pipeline.task, pipeline.supernet
    batches = task.evaluation_batches("validation", evaluation_amount(task, num_tokens), 8)
    state = read_state(pipeline.folder.supernet)

    def evaluate(arch: Arch) -> float:
        return held_out_loss(calibrated_view(supernet, arch, task), batches, task)

    stamp = {"num_tokens": num_tokens, "steps": state.step if state else 0}
    return Losses(evaluate, pipeline.folder.path / name, stamp)
