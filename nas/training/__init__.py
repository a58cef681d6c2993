"""Training the supernet: archs per step, distillation, stages, checkpoints, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nas.config import TrainConfig
from nas.progress import Reporter
from nas.training.device import CPU
from nas.training.precision import faster_precision
from nas.training.state import TrainState, load_supernet, read_state
from nas.training.task import TrainingTask
from nas.training.team import Team
from nas.training.trainer import Trainer, TrainingDiverged
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

__all__ = [
    "TrainState",
    "Trainer",
    "TrainingDiverged",
    "TrainingTask",
    "faster_precision",
    "load_supernet",
    "read_state",
    "train_supernet",
]


def train_supernet(
    space: SearchSpace,
    task: TrainingTask,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    budget_s: float,
    reporter: Reporter,
    team: Team | None = None,
    on_save: Callable[[TrainState], None] = lambda state: None,
) -> Supernet:
    """Train until the budget is used up, or load what `folder` already holds; return it on the CPU.

    A run that was interrupted goes on from its last checkpoint; with `config.num_steps` the result
    is bit for bit the one of an uninterrupted run. (On a GPU up to rounding: there sums may be
    added up in another order each time.)

    Args:
        space: the search space.
        task: gives the batches.
        config: the recipe.
        folder: holds `state.json`, the tensors and the log.
        seed: of initial weights, batches and archs.
        budget_s: seconds of training when `config.num_steps` is None and it has not begun yet.
        reporter: shows the progress.
        team: the processes that train together, each of which calls this with the same arguments;
            None for this one alone. The number of processes may change from one checkpoint on.
        on_save: called in every process after a checkpoint.

    Raises:
        TrainingDiverged: when a loss becomes NaN or infinite.
        UserError: when the folder holds a supernet of another space, or the recipe does not fit
            the space, the task or the device.
    """
    trainer = Trainer(space, task, config, folder, seed, budget_s, team, on_save)
    trainer.restore()
    if not trainer.state.done:
        trainer.run(reporter)
    return trainer.supernet.to(CPU)
