"""Recovering a chosen network: it trains on alone, from the weights it has in the supernet.

A supernet's weights are a compromise between all its networks. What one of them lost by it, a short
training of its own brings back, rounded as it will be stored.

Source: Cai et al. 2020, "Once-for-All", section 4 (fine-tuning of chosen networks); Yu et al. 2020,
"BigNAS", section 4 (when it helps); Loshchilov and Hutter 2017, "SGDR", equation 5 (cosine).
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas.calibration import calibrate, calibrated_extract
from nas.config import TrainConfig
from nas.evaluation import evaluation_amount, held_out_loss
from nas.optimizers import SupernetOptimizer
from nas.progress import Reporter
from nas.tasks.base import Task
from nas.training.losses import SoftTargets, hard_loss, predict, soft_targets, training_loss
from nas.training.trainer import TrainingDiverged
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

RECOVERY_SEED = 40_009
"""Added to the run's, so that the batches are not those that the supernet began with."""
VALIDATION_TOKENS, VALIDATION_BATCH = 32_768, 8
WARMUP_STEPS = 10


@dataclass(frozen=True)
class RecoveryRecipe:
    """How a network trains on.

    Args:
        steps: how many; 0 leaves the network as it is.
        batch_size: sequences, or examples, of a step.
        matrix_lr: peak learning rate of Muon, see `nas.optimizers`.
        other_lr: peak learning rate of AdamW.
        distillation: share of the teacher's soft targets in the loss; the rest is the data's.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).

    Raises:
        UserError: for values that make no sense.
    """

    steps: int
    batch_size: int = 8
    matrix_lr: float = 0.02
    other_lr: float = 0.003
    distillation: float = 0.5
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"recover_steps={self.steps} is negative; choose 0 (off) or more")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} is below 1; choose 1 or more")
        if not 0 <= self.distillation <= 1:
            raise UserError(f"distillation={self.distillation} is no share; choose 0 to 1")

    @staticmethod
    def of(train: TrainConfig, steps: int, precision: str) -> RecoveryRecipe:
        """Return the recipe that a supernet was trained by, for one network.

        Args:
            train: the supernet's; learning rates at the same peaks were measured to gain most.
            steps: how many.
            precision: what the supernet was really trained in.
        """
        return RecoveryRecipe(
            steps, train.batch_size, train.matrix_lr, train.other_lr, train.distillation, precision
        )


@dataclass(frozen=True)
class RecoveryFacts:
    """What recovery brought, on validation data.

    Args:
        steps: how many were done.
        loss_before: in nats per unit of the task.
        loss_after: of the weights that were kept, so never above `loss_before`.
        trained_loss: of the weights that training ended with.
        distilled: whether it had a teacher that was better.
        seconds: of training and judging.
    """

    steps: int
    loss_before: float
    loss_after: float
    trained_loss: float
    distilled: bool
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether the new weights were better, and so are the network's."""
        return self.trained_loss < self.loss_before

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for `export.json`."""
        return {**vars(self), "kept": self.kept}


class Recovery:
    """What an export does to networks before they are written: all recover, the largest first.

    It then teaches the others, where it is better than they are. After 300 steps of decoder-small
    that was 0.006 nats/byte better than the largest as it is in the supernet as teacher.

    Args:
        recipe: how they train on.
        seed: of the batches.
        reporter: shows the progress.
    """

    def __init__(self, recipe: RecoveryRecipe, seed: int, reporter: Reporter) -> None:
        self.recipe, self.seed, self.reporter = recipe, seed, reporter
        self._largest: tuple[Supernet, Subnet, RecoveryFacts] | None = None

    def __call__(self, supernet: Supernet, arch: Arch, task: Task) -> tuple[Subnet, RecoveryFacts]:
        """Return a recovered network and what it gained; see `recover`."""
        if arch == supernet.space.largest():
            network, facts = self._teacher(supernet, task)
            return copy.deepcopy(network), facts
        teacher = self._teacher(supernet, task)[0] if self.recipe.distillation else None
        return self._recovered(supernet, arch, task, teacher)

    def _teacher(self, supernet: Supernet, task: Task) -> tuple[Subnet, RecoveryFacts]:
        """Return the largest network of a supernet, recovered at the first call."""
        if self._largest is None or self._largest[0] is not supernet:
            largest = supernet.space.largest()
            self._largest = supernet, *self._recovered(supernet, largest, task, None)
        return self._largest[1:]

    def _recovered(
        self, supernet: Supernet, arch: Arch, task: Task, teacher: Subnet | None
    ) -> tuple[Subnet, RecoveryFacts]:
        return recover(supernet, arch, task, self.recipe, self.seed, self.reporter, teacher)

    def identity(self) -> dict[str, Any]:
        """Return what the result depends on besides weights and task, JSON-ready."""
        return {**vars(self.recipe), "seed": self.seed}


def recover(
    supernet: Supernet,
    arch: Arch,
    task: Task,
    recipe: RecoveryRecipe,
    seed: int,
    reporter: Reporter,
    teacher: Subnet | None = None,
) -> tuple[Subnet, RecoveryFacts]:
    """Return a network with weights of its own, better than or those of the supernet.

    Equal arguments give equal weights. It is not interrupted and resumed: it takes minutes at most
    for a thousand steps of a small network, and an export begins with what is not written yet.

    Args:
        supernet: trained; not changed.
        arch: which network.
        task: gives training batches, and validation data to judge by.
        recipe: how long and how.
        seed: of the batches.
        reporter: shows the progress.
        teacher: a frozen network of the same task; not listened to where it is no better than the
            one that it would teach.

    Returns:
        The network, ready to be judged or packed, and what it gained.

    Raises:
        TrainingDiverged: when a loss is not a number.
        UserError: when the arch is not of the supernet's space.
    """
    began = time.perf_counter()
    batches = task.evaluation_batches(
        "validation", evaluation_amount(task, VALIDATION_TOKENS), VALIDATION_BATCH
    )
    before = calibrated_extract(supernet, arch, task).eval()
    loss_before = held_out_loss(before, batches, task)
    if teacher is not None and not (
        recipe.distillation and held_out_loss(teacher, batches, task) < loss_before
    ):
        teacher = None
    subnet = supernet.extract(arch)
    _train(subnet, teacher, task, recipe, seed, reporter)
    calibrate(subnet, task)
    trained_loss = held_out_loss(subnet.eval(), batches, task)
    best = subnet if trained_loss < loss_before else before
    facts = RecoveryFacts(
        recipe.steps,
        loss_before,
        min(loss_before, trained_loss),
        trained_loss,
        teacher is not None,
        time.perf_counter() - began,
    )
    return best.requires_grad_(False), facts


def _train(
    subnet: Subnet,
    teacher: Subnet | None,
    task: Task,
    recipe: RecoveryRecipe,
    seed: int,
    reporter: Reporter,
) -> None:
    """Train a network in place; weights are rounded to its own precisions in every step."""
    subnet.train()
    optimizer = SupernetOptimizer(subnet, recipe.matrix_lr, recipe.other_lr)
    with reporter.bar(f"recover {subnet.arch.id}") as bar:
        for step in range(recipe.steps):
            inputs, targets = task.train_batch(step, recipe.batch_size, seed + RECOVERY_SEED)
            subnet.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                taught = None if teacher is None else _word_of(teacher, inputs, targets)
                prediction = predict(subnet, inputs, targets, with_hidden=False)
            hard = hard_loss(prediction, targets)
            loss = training_loss(hard, prediction, taught, recipe.distillation, 0.0)
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"the loss of network {subnet.arch.id} is {loss.item()} at step {step} of its "
                    "recovery; export it without, by export.recover_steps=0"
                )
            loss.backward()
            optimizer.step(learning_rate_scale(step, recipe.steps))
            bar.update((step + 1) / recipe.steps, f"loss {hard.item():.3f}")


@torch.no_grad()
def _word_of(teacher: Subnet, inputs: Tensor, targets: Tensor) -> SoftTargets:
    return soft_targets(predict(teacher, inputs, targets, with_hidden=False))


def learning_rate_scale(step: int, steps: int) -> float:
    """Return the factor on the peak learning rates: a short warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 10)))
    return warmup * 0.5 * (1.0 + math.cos(math.pi * step / steps))
