"""`Trainer`: the steps of a training, its stages, and going on where it was interrupted.

Source: Yu et al. 2020, "BigNAS", sections 3.1-3.2 (sandwich rule, in-place distillation);
Wang et al. 2022, "LightHuBERT" (two-stage distillation).
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from nas.arch_sampling import LARGEST, ArchSampler, StepArch
from nas.attention_transfer import SOFTMAX, transfer_attention
from nas.config import TrainConfig
from nas.optimizers import SupernetOptimizer
from nas.progress import Reporter
from nas.training.losses import (
    Prediction,
    SoftTargets,
    data_loss,
    hard_loss,
    predict,
    soft_targets,
    training_loss,
)
from nas.training.precision import faster_precision
from nas.training.schedule import Schedule
from nas.training.state import (
    FIRST_STAGE,
    LOG,
    MAIN_STAGE,
    TrainState,
    read_parts,
    read_state,
    save_state,
    truncate_log,
)
from nas.training.task import TrainingTask
from nas.training.teacher import Teacher
from searchspace.files import write_json
from searchspace.importance import order_by_importance
from searchspace.space import SearchSpace
from searchspace.specs import ABSENT
from searchspace.supernet import Supernet

IMPORTANCE_BATCHES = 8
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
    ) -> None:
        self.space, self.task, self.config, self.folder = space, task, config, folder
        self.seed, self.budget_s = seed, budget_s
        self.schedule = Schedule(config, budget_s)
        self.sampler = ArchSampler(config.sampling, space, config.num_random, seed)
        self.supernet = Supernet(space, torch.Generator().manual_seed(seed))
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
                precision = faster_precision()
            counted = self.config.num_steps is not None
            budget_s = None if counted else self.budget_s
            self.state = replace(self.state, precision=precision, budget_s=budget_s)
            return
        parts = read_parts(self.folder, state)
        self.supernet.load_state_dict(parts.get("weights", {}))
        self.optimizer.load_state_dict(parts.get("optimizer", {}))
        if "teacher" in parts:
            self.teacher = self.new_teacher()
            self.teacher.load_state_dict(parts["teacher"])
        self.state = state
        truncate_log(self.folder, state.step)

    def run(self, reporter: Reporter) -> None:
        """Train to the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last_count = time.perf_counter()
        with (self.folder / LOG).open("a") as log:
            if self.state.stage == FIRST_STAGE:
                self.run_stage(reporter, log)
                self.begin_main_stage(reporter)
                self.count_time()
                log.flush()
                self.save()
            self.run_stage(reporter, log)
        self.state = replace(self.state, done=True)
        self.supernet.norm_blend = 0.0
        self.save()

    def run_stage(self, reporter: Reporter, log: IO[str]) -> None:
        """Do the steps of the present stage."""
        last_save = time.perf_counter()
        with reporter.bar(BAR_TITLES[self.state.stage]) as bar:
            while self.schedule.stage_progress(self.state) < 1.0:
                losses = self.step()
                self.count_time()
                self.state = replace(self.state, step=self.state.step + 1)
                entry = {"step": self.state.step, "elapsed_s": self.state.elapsed_s, **losses}
                log.write(json.dumps(entry) + "\n")
                bar.update(self.schedule.stage_progress(self.state), self.describe(losses))
                if time.perf_counter() - last_save > self.config.checkpoint_s:
                    log.flush()
                    self.save()
                    last_save = time.perf_counter()

    def count_time(self) -> None:
        """Add what has passed since the last call to the training's time."""
        now = time.perf_counter()
        elapsed_s = self.state.elapsed_s + now - self.last_count
        self.last_count, self.state = now, replace(self.state, elapsed_s=elapsed_s)

    def begin_main_stage(self, reporter: Reporter) -> None:
        """Prepare the weights, freeze the teacher, and forget the first stage's momenta."""
        start = self.state.step
        self.supernet.norm_blend = self.schedule.norm_blend(self.state)
        if self.config.importance_ordering:
            steps = range(start, start + IMPORTANCE_BATCHES)
            order_by_importance(self.supernet, [self.batch(step) for step in steps], data_loss)
        self.teacher = self.new_teacher()
        if self.config.attention_transfer_steps:
            self.transfer_attention(reporter)
        self.optimizer = self.new_optimizer()
        self.state = replace(self.state, stage=MAIN_STAGE, stage_start=start)

    def transfer_attention(self, reporter: Reporter) -> None:
        """Warm up the other mixers where the first stage trained softmax; write the errors."""
        if any(layer.mixer not in (SOFTMAX, ABSENT) for layer in self.space.largest().layers):
            reporter.say(
                f"attention transfer is left out: the first mixer of space {self.space.name!r} is "
                "not softmax, so no softmax network is trained yet"
            )
            return
        errors = transfer_attention(
            self.supernet,
            self.task,
            steps=self.config.attention_transfer_steps,
            lr=self.config.attention_transfer_lr,
            seed=self.seed,
            reporter=reporter,
            batch_size=self.config.batch_size,
        )
        shown = {name: asdict(error) for name, error in errors.items()}
        write_json(self.folder / "attention_transfer.json", shown)

    def step(self) -> dict[str, float]:
        """Train the archs of the step on one batch; return the mean loss of each role."""
        inputs, targets = self.batch(self.state.step)
        self.supernet.norm_blend = self.schedule.norm_blend(self.state)
        self.supernet.start_step()
        teacher: SoftTargets | None = None
        if self.teacher is not None:
            with self.autocast():
                teacher = self.teacher(inputs, targets)
        losses: dict[str, list[float]] = defaultdict(list)
        for item in self.step_archs():
            loss, prediction = self.backward(item, inputs, targets, teacher)
            if not math.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss of the {item.role} network is {loss} at step {self.state.step}; "
                    "lower train.matrix_lr or train.other_lr"
                )
            losses[item.role].append(loss)
            if item.role == LARGEST and teacher is None:
                teacher = soft_targets(prediction)
        self.supernet.publish_gradients()
        self.optimizer.step(self.schedule.learning_rate_scale(self.state))
        return {role: sum(values) / len(values) for role, values in losses.items()}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a step."""
        return self.task.train_batch(step, self.config.batch_size, self.seed)

    def step_archs(self) -> list[StepArch]:
        """Return what the present step trains."""
        if self.state.stage == FIRST_STAGE:
            return [StepArch(LARGEST, self.space.largest())]
        return self.sampler.archs(self.state.step)

    def backward(
        self, item: StepArch, inputs: Tensor, targets: Tensor, teacher: SoftTargets | None
    ) -> tuple[float, Prediction]:
        """Add an arch's gradient; return its loss on the data and its prediction."""
        model = self.supernet.view(item.arch, train=True)
        match_hidden = teacher is not None and teacher.hidden_ND is not None
        with self.autocast():
            prediction = predict(model, inputs, targets, match_hidden)
        hard = hard_loss(prediction, targets)
        loss = training_loss(
            hard, prediction, teacher, self.config.distillation, self.config.hidden_distillation
        )
        with warnings.catch_warnings():
            # The gradient slices are strided on purpose (see Supernet).
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            (item.weight * loss).backward()
        return hard.item(), prediction

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.state.precision == "bf16")

    def describe(self, losses: dict[str, float]) -> str:
        """Return what the progress bar says."""
        done, what = self.state.step * self.config.batch_size, "images"
        if self.space.family.kind != "vit":
            done, what = done * self.task.seq_len, "tokens"
        figures = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        return f"{figures} | {done / max(self.state.elapsed_s, 1e-9):,.0f} {what}/s"

    def save(self) -> None:
        """Write a checkpoint; after the end only the weights."""
        parts = {"weights": self.supernet.state_dict()}
        if not self.state.done:
            parts["optimizer"] = self.optimizer.state_dict()
            if self.teacher is not None:
                parts["teacher"] = self.teacher.state_dict()
        self.state = save_state(self.folder, self.state, parts)
