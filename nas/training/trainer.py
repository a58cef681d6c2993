"""`Trainer`: the steps of a training, its stages, and going on where it was interrupted.

Source: Yu et al. 2020, "BigNAS", sections 3.1-3.2 (sandwich rule, in-place distillation);
Wang et al. 2022, "LightHuBERT" (two-stage distillation).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from nas.arch_sampling import LARGEST, ArchSampler, StepArch
from nas.config import TrainConfig
from nas.optimizers import SupernetOptimizer
from nas.progress import Reporter
from nas.training.batch import Batch
from nas.training.device import training_device
from nas.training.distributed import teach_from
from nas.training.losses import SoftTargets, num_scored
from nas.training.main_stage import begin_main_stage
from nas.training.modes import new_passes
from nas.training.passes import Outcome
from nas.training.precision import faster_precision
from nas.training.schedule import Schedule
from nas.training.state import (
    FIRST_STAGE,
    LOG,
    MAIN_STAGE,
    START,
    TrainState,
    read_parts,
    read_state,
    save_state,
    truncate_log,
)
from nas.training.task import TrainingTask
from nas.training.teacher import Teacher
from nas.training.team import Alone, Team
from searchspace.errors import UserError
from searchspace.files import read_tensors
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

BAR_TITLES = {FIRST_STAGE: "train largest", MAIN_STAGE: "train"}


class TrainingDiverged(RuntimeError):
    """The loss of a network is no longer a number."""


class Trainer:
    """One training of a supernet in a folder; see `nas.training.train_supernet`."""

    def __init__(
        self,
        space: SearchSpace,
        task: TrainingTask,
        config: TrainConfig,
        folder: Path,
        seed: int,
        budget_s: float,
        team: Team | None = None,
        on_save: Callable[[TrainState], None] = lambda state: None,
    ) -> None:
        self.team, self.on_save = team or Alone(), on_save
        self.space, self.task, self.config, self.folder = space, task, config, folder
        self.seed, self.budget_s = seed, budget_s
        self.device = training_device(config.device)
        self.schedule = Schedule(config, budget_s)
        self.sampler = ArchSampler(config.sampling, space, config.num_random, seed)
        self.supernet = Supernet(space, torch.Generator().manual_seed(seed)).to(self.device)
        self.passes = new_passes(self.supernet, config, self.autocast)
        self.optimizer = self.new_optimizer()
        self.teacher: Teacher | None = None
        self.state = TrainState(stage=FIRST_STAGE if config.first_stage_share else MAIN_STAGE)
        self.last_count = time.perf_counter()

    def new_optimizer(self) -> SupernetOptimizer:
        """Return an optimizer without momenta."""
        return SupernetOptimizer(self.supernet, self.config.matrix_lr, self.config.other_lr)

    def new_teacher(self) -> Teacher:
        """Return a frozen copy of the present largest network."""
        return Teacher(self.supernet, with_hidden=self.config.hidden_distillation > 0)

    def restore(self) -> None:
        """Take up the folder's checkpoint, or begin."""
        state = read_state(self.folder)
        if state is None:
            precision = self.config.precision
            if precision == "auto":
                precision = faster_precision(self.device)
            counted = self.config.num_steps is not None
            budget_s = None if counted else self.budget_s
            self.state = replace(self.state, precision=precision, budget_s=budget_s)
            if self.config.start:
                self.start_from(Path(self.config.start))
        else:
            self.load(state)
        self.state = replace(self.state, device=self.device.type)
        self.agree()

    def start_from(self, folder: Path) -> None:
        """Begin with the weights that `nas import` wrote, and their network as teacher."""
        self.supernet.load_state_dict(read_tensors(folder / START))
        if self.state.stage == MAIN_STAGE:
            self.teacher = self.new_teacher()

    def load(self, state: TrainState) -> None:
        """Take up a checkpoint."""
        parts = read_parts(self.folder, state)
        self.supernet.load_state_dict(parts.get("weights", {}))
        self.optimizer.load_state_dict(parts.get("optimizer", {}))
        if "teacher" in parts:
            self.teacher = self.new_teacher()
            self.teacher.load_state_dict(parts["teacher"])
        self.state = state
        if self.team.rank == 0:
            truncate_log(self.folder, state.step)

    def agree(self) -> None:
        """Start from rank 0's state.

        Raises:
            UserError: when this process found another checkpoint than rank 0, or has another
                kind of device.
        """
        agreed = TrainState(**self.team.agree(asdict(self.state)))
        if agreed.file != self.state.file:
            raise UserError(
                f"{self.folder} holds {self.state.file or 'no checkpoint'} for process "
                f"{self.team.rank} and {agreed.file or 'none'} for process 0; the folder must be "
                "the same for all, on storage that they share"
            )
        if agreed.device != self.device.type:
            raise UserError(
                f"process {self.team.rank} would train on {self.device.type} and process 0 on "
                f"{agreed.device}; give all of them the same, or choose train.device=cpu"
            )
        self.state = agreed
        self.team.take_weights(self.supernet)

    def run(self, reporter: Reporter) -> None:
        """Train to the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last_count = time.perf_counter()
        path = self.folder / LOG if self.team.rank == 0 else Path(os.devnull)
        with path.open("a") as log:
            if self.state.stage == FIRST_STAGE:
                self.run_stage(reporter, log)
                begin_main_stage(self, reporter)
                self.count_time()
                log.flush()
                self.save()
            self.run_stage(reporter, log)
        self.state = replace(self.state, done=True)
        self.supernet.norm_blend = 0.0
        self.save()

    def run_stage(self, reporter: Reporter, log: IO[str]) -> None:
        """Do the steps of the present stage."""
        last_save_s = self.state.elapsed_s
        with reporter.bar(BAR_TITLES[self.state.stage]) as bar:
            while self.schedule.stage_progress(self.state) < 1.0:
                losses = self.step()
                self.count_time()
                self.state = replace(self.state, step=self.state.step + 1)
                entry = {"step": self.state.step, "elapsed_s": self.state.elapsed_s, **losses}
                log.write(json.dumps(entry) + "\n")
                bar.update(self.schedule.stage_progress(self.state), self.describe(losses))
                if self.state.elapsed_s - last_save_s > self.config.checkpoint_s:
                    log.flush()
                    self.save()
                    self.count_time()
                    last_save_s = self.state.elapsed_s

    def count_time(self) -> None:
        """Add what has passed since the last call to the training's time, by rank 0's clock."""
        now = time.perf_counter()
        own = {"elapsed_s": self.state.elapsed_s + now - self.last_count}
        elapsed_s = self.team.agree(own)["elapsed_s"]
        self.last_count, self.state = now, replace(self.state, elapsed_s=elapsed_s)

    def step(self) -> dict[str, float]:
        """Train the archs of the step on one batch; return the mean loss of each role."""
        self.supernet.norm_blend = self.schedule.norm_blend(self.state)
        self.supernet.start_step()
        archs = self.step_archs()
        losses: dict[str, list[float]] = defaultdict(list)
        for item, loss in zip(archs, self.team.sum_values(self.own_losses(archs)), strict=True):
            if not math.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss of the {item.role} network is {loss} at step {self.state.step}; "
                    "lower train.matrix_lr or train.other_lr"
                )
            losses[item.role].append(loss)
        self.supernet.publish_gradients()
        self.team.sum_gradients(self.supernet)
        self.optimizer.step(self.schedule.learning_rate_scale(self.state))
        return {role: sum(values) / len(values) for role, values in losses.items()}

    def own_losses(self, archs: Sequence[StepArch]) -> list[float]:
        """Add the gradients of this process's share; return its part of each arch's loss."""
        inputs, targets = self.batch(self.state.step)
        share = self.team.share(archs, len(inputs))
        losses = [0.0] * len(archs)
        own = targets[share.rows]
        part = num_scored(own) / max(1, num_scored(targets))
        if not share.archs or (not part and len(own) < len(targets)):
            return losses
        batch = Batch.on(self.device, inputs[share.rows], own, self.passes.static)
        teacher = self.soft_targets_of(archs[0], 0 in share.archs, batch)
        found = []
        for place in share.archs:
            item = replace(archs[place], weight=archs[place].weight * part)
            outcome = self.backward(item, batch, teacher)
            found.append(outcome.hard)
            teacher = outcome.word or teacher
        # Only here the host waits for the device.
        for place, loss in zip(share.archs, torch.stack(found).tolist(), strict=True):
            losses[place] = part * loss
        return losses

    def soft_targets_of(self, first: StepArch, is_own: bool, batch: Batch) -> SoftTargets | None:
        """Return what teaches from the start: the frozen teacher, or what another trains."""
        if self.teacher is not None:
            return self.passes.teach(self.teacher, batch)
        if is_own or first.role != LARGEST or not self.config.distillation:
            return None
        with self.autocast():
            return teach_from(self.supernet, first.arch, batch)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a step, where the task makes them: on the host."""
        return self.task.train_batch(step, self.config.batch_size, self.seed)

    def step_archs(self) -> list[StepArch]:
        """Return what the present step trains."""
        if self.state.stage == FIRST_STAGE:
            return [StepArch(LARGEST, self.space.largest())]
        return self.sampler.archs(self.state.step)

    def backward(self, item: StepArch, batch: Batch, teacher: SoftTargets | None) -> Outcome:
        """Add an arch's gradient; return its loss on the data and, if it may teach, its word."""
        return self.passes.backward(item, batch, teacher)

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes."""
        enabled = self.state.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def describe(self, losses: dict[str, float]) -> str:
        """Return what the progress bar says."""
        done, what = self.state.step * self.config.batch_size, "images"
        if self.space.family.kind != "vit":
            done, what = done * self.task.seq_len, "tokens"
        figures = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        return f"{figures} | {done / max(self.state.elapsed_s, 1e-9):,.0f} {what}/s"

    def save(self) -> None:
        """Write a checkpoint; after the end only the weights. Rank 0 writes for all."""
        if self.team.rank == 0:
            self.write()
        self.on_save(self.state)

    def write(self) -> None:
        """Write weights, and what else it takes to go on."""
        parts = {"weights": self.supernet.state_dict()}
        if not self.state.done:
            parts["optimizer"] = self.optimizer.state_dict()
            if self.teacher is not None:
                parts["teacher"] = self.teacher.state_dict()
        self.state = save_state(self.folder, self.state, parts)
