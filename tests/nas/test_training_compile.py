"""Archs that recur by `torch.compile`, for real on this processor."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hw_profiles.backends.compiled import CompiledBackend
from nas.config import TrainConfig
from nas.training import compiled_passes
from nas.training.compiled_passes import CompiledPasses
from nas.training.trainer import Trainer
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.counting_task import SPACE, VOCAB, CountingTask

CONFIG = TrainConfig(num_steps=9, batch_size=2, precision="fp32", compile="compile")


def trainer_of(folder: Path, config: TrainConfig, num_layers: int = 2) -> Trainer:
    space = SearchSpace.from_dict({**SPACE, "num_layers": num_layers}, VOCAB)
    trainer = Trainer(space, CountingTask(), config, folder, 3, 1e9)
    trainer.restore()
    return trainer


def gradients(trainer: Trainer, archs: list[Any]) -> dict[str, Tensor]:
    """Return the gradients of a step without the optimizer's; None left out."""
    trainer.supernet.start_step()
    trainer.own_losses(archs)
    trainer.supernet.publish_gradients()
    named = trainer.supernet.named_parameters()
    return {name: param.grad.clone() for name, param in named if param.grad is not None}


@pytest.mark.slow
def test_compiled_networks_have_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if reason := CompiledBackend().unavailable():
        pytest.skip(reason)
    views: list[object] = []
    view = Supernet.view

    def watching(self: Supernet, arch: Any, train: bool = False) -> Any:
        views.append(arch)
        return view(self, arch, train)

    monkeypatch.setattr(Supernet, "view", watching)
    config = replace(CONFIG, num_random=0)
    trainer = trainer_of(tmp_path, config, num_layers=1)
    plain = trainer_of(tmp_path / "plain", replace(config, compile="off"), num_layers=1)
    archs = trainer.step_archs()
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            views.clear()
            found, expected = gradients(trainer, archs), gradients(plain, archs)
            assert found.keys() == expected.keys()
            for name, grad in expected.items():
                torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)
            # The second time a network is made to stay.
            assert len(views) == (4 if step < 2 else 2)
            # Compiled networks see what an optimizer does.
            with torch.no_grad():
                for one, other in zip(
                    trainer.supernet.params.values(), plain.supernet.params.values(), strict=True
                ):
                    one.mul_(0.9)
                    other.mul_(0.9)
    assert not caplog.records
    assert isinstance(trainer.passes, CompiledPasses)
    assert len(trainer.passes._compiled) == 2


def test_what_cannot_be_compiled_runs_plainly_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: object, **settings: object) -> Any:
        def run(*args: object) -> Tensor:
            raise RuntimeError("no kernel for this\nand pages of advice")

        return run

    config = replace(CONFIG, num_random=0)
    plain = trainer_of(tmp_path / "plain", replace(config, compile="off"))
    monkeypatch.setattr(torch, "compile", fails)
    trainer = trainer_of(tmp_path, config)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert trainer.step() == plain.step()
    assert [r.message for r in caplog.records] == [
        f"the {role} network is not compiled: RuntimeError: no kernel for this"
        for role in ("largest", "smallest")
    ]


def test_a_function_that_the_compiler_leaves_as_it_is_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setitem(counters, "stats", Counter())
    monkeypatch.setattr(compiled_passes, "MAX_NETWORKS", 1)
    trainer = trainer_of(tmp_path, CONFIG)
    plain = trainer_of(tmp_path / "plain", replace(CONFIG, compile="off"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert trainer.step() == plain.step()
    assert [r.message for r in caplog.records] == [
        "the largest network is not compiled: torch.compile left it as it is"
    ]
