"""Training on a real GPU: `pytest -m gpu`; see test_training_graphs.py for a made-up one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.arch_sampling import LARGEST, RANDOM, StepArch
from nas.config import TrainConfig
from nas.grouped_muon import GroupedMuon
from nas.progress import Reporter
from nas.training import train_supernet
from nas.training.batch import Batch
from nas.training.device import training_device
from nas.training.graph_passes import GraphPasses
from nas.training.passes import Passes, PlainPasses
from nas.training.trainer import Trainer
from searchspace.arch import Arch
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.counting_task import CountingTask, losses, make_space

pytestmark = pytest.mark.gpu

CONFIG = TrainConfig(num_steps=8, batch_size=4, precision="fp32", warmup_steps=2, device="cuda")
OPERATORS = "decoder-operators"


def gradients(supernet: Supernet, passes: Passes, arch: Arch, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of an arch that learns from the largest."""
    supernet.start_step()
    teacher = passes.backward(StepArch(LARGEST, supernet.space.largest()), batch, None)
    passes.backward(StepArch(RANDOM, arch), batch, teacher.word)
    supernet.publish_gradients()
    return {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the norm of the difference relative to that of the second."""
    assert first.keys() == second.keys()
    difference = sum(float((first[n] - second[n]).double().square().sum()) for n in second)
    return (difference / sum(float(t.double().square().sum()) for t in second.values())) ** 0.5


@pytest.mark.parametrize("mixer", sorted(SearchSpace.load(OPERATORS, 64).mixers))
def test_every_mixer_is_captured_with_its_gradients(mixer: str) -> None:
    space, device = SearchSpace.load(OPERATORS, 64), training_device("cuda")
    arch = space.uniform(mixer=mixer)
    supernet = Supernet(space, torch.Generator().manual_seed(0)).to(device)
    plain = PlainPasses(supernet, CONFIG, contextlib.nullcontext)
    graphs = GraphPasses(plain, supernet)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        tokens = torch.randint(0, 64, (2, 129), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, : 4 + step] = -100
        batch = Batch.on(device, tokens[:, :-1], targets, static=True)
        expected = gradients(supernet, plain, arch, batch)
        assert apart(gradients(supernet, graphs, arch, batch), expected) < 1e-3
    assert len(graphs._graphs._recorded) == 2, graphs._graphs._said


@pytest.mark.parametrize("mode", ["off", "graphs", "compile"])
def test_trainings_agree_with_the_processor(tmp_path: Path, mode: str) -> None:
    config = replace(CONFIG, compile=mode, distillation=0.5)
    there = Trainer(make_space(), CountingTask(), config, tmp_path, 3, 1e9)
    here_config = replace(config, device="cpu", compile="off")
    here = Trainer(make_space(), CountingTask(), here_config, tmp_path, 3, 1e9)
    for trainer in (there, here):
        trainer.restore()
    for step in range(6):
        for trainer in (there, here):
            trainer.state = replace(trainer.state, step=step)
        found, expected = there.step(), here.step()
        # Muon rounds to bf16, so they drift apart slowly.
        assert found == pytest.approx(expected, rel=1e-4 * 4**step)


def test_a_training_learns_in_bf16_and_ends_on_the_processor(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config = replace(CONFIG, precision="auto", num_steps=60, batch_size=8)
    supernet = train_supernet(
        make_space(), CountingTask(), config, tmp_path, seed=3, budget_s=1e9,
        reporter=Reporter(quiet=True),
    )  # fmt: skip
    assert supernet.device.type == "cpu"
    log = losses(tmp_path)
    assert log[-1]["largest"] < 0.5 * log[0]["largest"]


def test_matrices_move_as_by_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(256, 256), (256, 256), (64, 256), (256, 64), (256, 64)]
    start = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = (
        GroupedMuon(ours, lr=0.02, momentum=0.95),
        torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).cuda()
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, begin in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (other - begin).norm()
