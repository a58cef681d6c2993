"""The sides of `training_throughput`: plain training of one network, and a supernet's steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nas.arch_sampling import LARGEST, StepArch
from nas.config import TrainConfig
from nas.optimizers import SupernetOptimizer
from nas.training.batch import Batch
from nas.training.device import training_device
from nas.training.graphs import Graphs, Tensors
from nas.training.losses import data_loss
from nas.training.modes import COMPILE, GRAPHS, compile_mode
from nas.training.state import FIRST_STAGE
from nas.training.trainer import Trainer
from searchspace.cost import arch_cost, num_params
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet

NUM_COUNTED = 20
"""Steps whose archs are weighed."""


@dataclass(frozen=True)
class RandomTokens:
    """A task whose batches are random tokens."""

    seq_len: int
    vocab_size: int

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T)."""
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        shape = batch_size, self.seq_len + 1
        tokens = torch.randint(0, self.vocab_size, shape, generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


class PlainTraining:
    """Ordinary training of the largest network, without a supernet."""

    num_archs, work = 1, 1.0

    def __init__(self, space: SearchSpace, task: RandomTokens, config: TrainConfig) -> None:
        self.task, self.config, self.num_steps = task, config, 0
        self.device = training_device(config.device)
        self.network = Subnet(space.largest()).reset(torch.Generator().manual_seed(0))
        self.network.to(self.device).train()
        self.optimizer = SupernetOptimizer(self.network, config.matrix_lr, config.other_lr)
        mode = compile_mode(config, self.device)
        self.graphs = Graphs(self.device, self.gradients) if mode == GRAPHS else None
        if mode == COMPILE:
            self.network.features = torch.compile(self.network.features, dynamic=False)  # type: ignore[method-assign]

    def gradients(self) -> list[Tensor]:
        """Return what a backward pass adds to."""
        return [param.grad for param in self.network.parameters() if param.grad is not None]

    def passes(self, tensors: Tensors) -> Tensors:
        """Add the gradient of a batch; return its loss."""
        inputs, targets = tensors
        assert inputs is not None and targets is not None
        enabled = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            logits = self.network(inputs)
        loss = data_loss(logits, targets)
        loss.backward()
        return (loss.detach(),)

    def step(self) -> Tensor:
        """Train on one batch; return the loss before it."""
        drawn = self.task.train_batch(self.num_steps, self.config.batch_size, 0)
        batch = Batch.on(self.device, *drawn)
        # In the same memory, as graphs need it.
        self.network.zero_grad(set_to_none=self.graphs is None)
        given = batch.inputs, batch.targets
        if self.graphs is None:
            (loss,) = self.passes(given)
        else:
            (loss,) = self.graphs("the plain network", "plain", self.passes, given)
        self.optimizer.step(1.0)
        self.num_steps += 1
        assert loss is not None
        return loss


class SupernetTraining:
    """Steps of `Trainer`, of one stage for ever."""

    def __init__(
        self, space: SearchSpace, task: RandomTokens, config: TrainConfig, stage: str, folder: Path
    ) -> None:
        self.trainer = Trainer(space, task, config, folder, 0, 1e9)
        self.trainer.restore()
        self.trainer.state = replace(self.trainer.state, stage=stage)
        archs = [self.archs_of(step) for step in range(NUM_COUNTED)]
        self.num_archs = len(archs[0])
        whole = arch_cost(space.largest(), num_params)
        each = [arch_cost(item.arch, num_params) / whole for step in archs for item in step]
        self.work = statistics.mean(each)

    def archs_of(self, step: int) -> list[StepArch]:
        """Return what a step trains."""
        if self.trainer.state.stage == FIRST_STAGE:
            return [StepArch(LARGEST, self.trainer.space.largest())]
        return self.trainer.sampler.archs(step)

    def step(self) -> float:
        """Train on one batch; return the loss of the largest network before it."""
        losses = self.trainer.step()
        self.trainer.state = replace(self.trainer.state, step=self.trainer.state.step + 1)
        return losses[LARGEST]
