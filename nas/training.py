"""Training the supernet: sandwich rule, in-place distillation, checkpoints, exact resume.

Shapes: B batch, T tokens, V vocabulary.

Source: Yu et al. 2020, "BigNAS", sections 3.1-3.2 (sandwich rule, in-place distillation);
Devvrit et al. 2023, "MatFormer" (nested FFNs).
"""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nas.config import TrainConfig
from nas.optimizers import SupernetOptimizer
from nas.progress import Reporter
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.files import read_json, read_tensors, write_json, write_tensors
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet


class TrainingTask(Protocol):
    """What training needs of a task: tokens per sequence, and batches."""

    seq_len: int

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) of a step; the same for the same arguments."""
        ...


@dataclass(frozen=True)
class TrainState:
    """Where training stands; with the tensors of `file` it is all that resuming needs.

    Args:
        step: steps done.
        budget_s: seconds of training in all, fixed when it began; None where steps are counted.
        elapsed_s: seconds spent on them, over all processes.
        precision: ``"fp32"`` or ``"bf16"``.
        done: whether training has ended.
        file: name of the tensors' file.
    """

    step: int = 0
    budget_s: float | None = None
    elapsed_s: float = 0.0
    precision: str = "fp32"
    done: bool = False
    file: str = ""


class TrainingDiverged(RuntimeError):
    """The loss of the largest network is no longer a number."""


def train_supernet(
    space: SearchSpace,
    task: TrainingTask,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    budget_s: float,
    reporter: Reporter,
) -> Supernet:
    """Train until the budget is used up, or load what `folder` already holds.

    A run that was interrupted goes on from its last checkpoint; with `config.num_steps` the result
    is bit for bit the one of an uninterrupted run.

    Args:
        space: the search space.
        task: gives the batches.
        config: the recipe.
        folder: holds `state.json`, the tensors and the log.
        seed: of initial weights, batches and archs.
        budget_s: seconds of training when `config.num_steps` is None and it has not begun yet.
        reporter: shows the progress.

    Raises:
        TrainingDiverged: when the loss becomes NaN or infinite.
        UserError: when the folder holds a supernet of another space.
    """
    trainer = _Trainer(space, task, config, folder, seed, budget_s)
    trainer.restore()
    if not trainer.state.done:
        trainer.run(reporter)
    return trainer.supernet


def load_supernet(space: SearchSpace, folder: Path) -> Supernet:
    """Load a trained supernet.

    Raises:
        UserError: when training has not finished, or the files are not of this space.
    """
    state = read_state(folder)
    if state is None or not state.done:
        raise UserError(f"{folder} holds no trained supernet; run `nas train` first")
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    supernet.load_state_dict(_part(read_tensors(folder / state.file), "weights"))
    return supernet


def read_state(folder: Path) -> TrainState | None:
    """Return where training in `folder` stands; None when it has not begun."""
    path = folder / "state.json"
    return TrainState(**read_json(path, "training state")) if path.exists() else None


def faster_precision(dim: int = 512, repeats: int = 5) -> str:
    """Return ``"bf16"`` where bf16 matrix products are at least 1.5 times as fast, else fp32."""

    def fastest(dtype: torch.dtype) -> float:
        x = torch.randn(2048, dim).to(dtype)
        w = torch.randn(dim, dim).to(dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        return min(times)

    return "bf16" if fastest(torch.float32) > 1.5 * fastest(torch.bfloat16) else "fp32"


class _Trainer:
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
        self.state = TrainState()
        self.supernet = Supernet(space, torch.Generator().manual_seed(seed))
        self.optimizer = SupernetOptimizer(self.supernet, config.matrix_lr, config.other_lr)
        self.anchors = (space.largest(), space.smallest())

    def restore(self) -> None:
        state = read_state(self.folder)
        if state is None:
            precision = self.config.precision
            if precision == "auto":
                precision = faster_precision()
            self.state = TrainState(
                precision=precision,
                budget_s=None if self.config.num_steps is not None else self.budget_s,
            )
            return
        tensors = read_tensors(self.folder / state.file)
        self.supernet.load_state_dict(_part(tensors, "weights"))
        self.optimizer.load_state_dict(_part(tensors, "optimizer"))
        self.state = state
        _truncate_log(self.folder / "log.jsonl", state.step)

    def run(self, reporter: Reporter) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        last_step = last_save = time.perf_counter()
        with reporter.bar("train") as bar, (self.folder / "log.jsonl").open("a") as log:
            while self.progress() < 1.0:
                losses = self.step()
                now = time.perf_counter()
                took, last_step = now - last_step, now
                self.state = replace(
                    self.state, step=self.state.step + 1, elapsed_s=self.state.elapsed_s + took
                )
                entry = {"step": self.state.step, "elapsed_s": self.state.elapsed_s, **losses}
                log.write(json.dumps(entry) + "\n")
                bar.update(self.progress(), self.describe(losses))
                if now - last_save > self.config.checkpoint_s:
                    log.flush()
                    self.save()
                    last_save = time.perf_counter()
        self.state = replace(self.state, done=True)
        self.save()

    def progress(self) -> float:
        if self.config.num_steps is not None:
            return self.state.step / self.config.num_steps
        return self.state.elapsed_s / (self.state.budget_s or self.budget_s)

    def learning_rate_scale(self) -> float:
        warmup = min(1.0, (self.state.step + 1) / max(1, self.config.warmup_steps))
        decay = min(1.0, (1.0 - self.progress()) / self.config.decay_share)
        return max(warmup * decay, 0.01)

    def step(self) -> dict[str, float]:
        """Train the largest, the smallest and random archs on one batch; return their losses."""
        inputs, targets = self.task.train_batch(self.state.step, self.config.batch_size, self.seed)
        largest, smallest = self.anchors
        self.supernet.start_step()
        losses: dict[str, float] = {}
        losses["largest"], teacher = self.backward(largest, inputs, targets, None)
        losses["smallest"], _ = self.backward(smallest, inputs, targets, teacher)
        rng = np.random.default_rng([self.seed, self.state.step])
        for _ in range(self.config.num_random):
            losses["random"], _ = self.backward(self.space.sample(rng), inputs, targets, teacher)
        if not math.isfinite(losses["largest"]):
            raise TrainingDiverged(
                f"the loss of the largest network is {losses['largest']} at step "
                f"{self.state.step}; lower train.matrix_lr or train.other_lr"
            )
        self.supernet.publish_gradients()
        self.optimizer.step(self.learning_rate_scale())
        return losses

    def backward(
        self, arch: Arch, inputs: Tensor, targets: Tensor, teacher: Tensor | None
    ) -> tuple[float, Tensor]:
        """Add an arch's gradient; return its loss on the data and its soft predictions."""
        model = self.supernet.view(arch, train=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.state.precision == "bf16"):
            logits = model(inputs)
        log_probs = F.log_softmax(logits.float().flatten(0, 1), dim=-1)
        hard = F.nll_loss(log_probs, targets.flatten())
        loss = hard
        if teacher is not None:
            soft = -(teacher * log_probs).sum(dim=-1).mean()
            loss = (1 - self.config.distillation) * hard + self.config.distillation * soft
        with warnings.catch_warnings():
            # The gradient slices are strided on purpose (see Supernet).
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            loss.backward()
        return hard.item(), log_probs.detach().exp_() if teacher is None else log_probs

    def describe(self, losses: dict[str, float]) -> str:
        tokens = self.state.step * self.config.batch_size * self.task.seq_len
        figures = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
        return f"{figures} | {tokens / max(self.state.elapsed_s, 1e-9):,.0f} tokens/s"

    def save(self) -> None:
        file = f"step-{self.state.step:07d}.safetensors"
        tensors = {f"weights/{k}": v for k, v in self.supernet.state_dict().items()}
        if not self.state.done:
            tensors |= {f"optimizer/{k}": v for k, v in self.optimizer.state_dict().items()}
        else:
            file = "model.safetensors"
        write_tensors(self.folder / file, tensors)
        self.state = replace(self.state, file=file)
        write_json(self.folder / "state.json", asdict(self.state))
        for old in self.folder.glob("*.safetensors"):
            if old.name != file:
                old.unlink()


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = part + "/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _truncate_log(path: Path, step: int) -> None:
    """Drop the log's lines of steps that are not in the checkpoint and will be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(kept), encoding="utf-8")
