"""Training one network alone, with the recipe that the supernet has."""

from __future__ import annotations

import torch

from nas.config import TrainConfig
from nas.optimizers import SupernetOptimizer
from nas.tasks.base import Task
from nas.training.losses import data_loss
from nas.training.schedule import Schedule
from nas.training.state import TrainState
from searchspace.arch import Arch
from searchspace.subnet import Subnet


def train_alone(
    arch: Arch, task: Task, config: TrainConfig, seed: int, precision: str = "fp32"
) -> Subnet:
    """Train a plain network for `config.num_steps` steps from fresh weights.

    Args:
        arch: the network.
        task: gives the batches, the same ones as a supernet's training with this seed.
        config: optimizer, schedule and batch size.
        seed: of weights and batches.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
    """
    subnet = Subnet(arch).reset(torch.Generator().manual_seed(seed)).train()
    optimizer = SupernetOptimizer(subnet, config.matrix_lr, config.other_lr)
    schedule = Schedule(config, 1.0)
    assert config.num_steps is not None
    for step in range(config.num_steps):
        inputs, targets = task.train_batch(step, config.batch_size, seed)
        subnet.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = subnet(inputs)
        data_loss(logits, targets).backward()
        optimizer.step(schedule.learning_rate_scale(TrainState(step=step)))
    return subnet.eval()
