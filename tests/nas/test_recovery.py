"""Recovery: a chosen network trains on alone, and never comes out worse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nas.recovery
from nas.calibration import calibrated_extract, needs_calibration
from nas.evaluation import held_out_loss
from nas.export.checker import Checker
from nas.export.delivery import ExportSource, export_subnet
from nas.progress import Reporter
from nas.recovery import Recovery, RecoveryRecipe, learning_rate_scale, recover
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.language_model import LanguageModelTask
from nas.training import TrainingDiverged
from searchspace.arch import Arch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

QUIET = Reporter(quiet=True)
RECIPE = RecoveryRecipe(steps=12, batch_size=4, matrix_lr=0.02, other_lr=0.003)


@pytest.fixture(autouse=True)
def little_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nas.recovery, "VALIDATION_TOKENS", 1024)


def with_layers(arch: Arch, **values: Any) -> Arch:
    return replace(arch, layers=tuple(replace(layer, **values) for layer in arch.layers))


def validation_loss(subnet: Subnet, task: LanguageModelTask) -> float:
    return held_out_loss(subnet, task.evaluation_batches("validation", 1024, 8), task)


def test_a_network_gets_better_and_the_supernet_stays(
    supernet: Supernet, task: LanguageModelTask
) -> None:
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    arch = supernet.space.smallest()
    subnet, facts = recover(supernet, arch, task, RECIPE, 0, QUIET)
    assert facts.kept and facts.loss_after < facts.loss_before - 0.02
    own = calibrated_extract(supernet, arch, task).eval()
    assert facts.loss_before == validation_loss(own, task)
    assert facts.loss_after == facts.trained_loss == validation_loss(subnet, task)
    assert facts.steps == 12 and facts.seconds > 0
    assert not subnet.training and not any(p.requires_grad for p in subnet.parameters())
    assert all(torch.equal(t, before[name]) for name, t in supernet.state_dict().items())
    again, second = recover(supernet, arch, task, RECIPE, 0, QUIET)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, subnet.state_dict()[name])
    assert replace(second, seconds=0) == replace(facts, seconds=0)
    other, _ = recover(supernet, arch, task, RECIPE, 1, QUIET)
    assert not torch.equal(other.ends.head.weight, subnet.ends.head.weight)


def test_worse_weights_are_not_kept(supernet: Supernet, task: LanguageModelTask) -> None:
    arch = supernet.space.smallest()
    wild = replace(RECIPE, matrix_lr=30.0, other_lr=30.0)
    subnet, facts = recover(supernet, arch, task, wild, 0, QUIET)
    assert facts.trained_loss > facts.loss_before == facts.loss_after and not facts.kept
    for name, tensor in calibrated_extract(supernet, arch, task).state_dict().items():
        assert torch.equal(tensor, subnet.state_dict()[name])


def test_no_steps_change_nothing(supernet: Supernet, task: LanguageModelTask) -> None:
    arch = supernet.space.smallest()
    subnet, facts = recover(supernet, arch, task, replace(RECIPE, steps=0), 0, QUIET)
    assert facts.loss_before == facts.loss_after == facts.trained_loss and not facts.kept
    assert torch.equal(subnet.ends.head.weight, supernet.extract(arch).ends.head.weight)


def test_training_rounds_as_the_stored_network_does(
    supernet: Supernet, task: LanguageModelTask
) -> None:
    arch = with_layers(supernet.space.smallest(), mixer_precision="int8", ffn_precision="int4")
    subnet, facts = recover(supernet, arch, task, RECIPE, 0, QUIET)
    assert facts.kept
    assert validation_loss(subnet.pack(), task) == pytest.approx(facts.loss_after, rel=2e-3)


def test_running_statistics_are_those_of_the_new_weights(
    task: LanguageModelTask, space: SearchSpace
) -> None:
    supernet = Supernet(replace(space, norm=("prepbn",)), torch.Generator().manual_seed(0))
    arch = supernet.space.smallest()
    assert needs_calibration(arch)
    subnet, facts = recover(supernet, arch, task, RECIPE, 0, QUIET)
    assert facts.kept and facts.loss_after == validation_loss(subnet, task)


def test_only_a_better_teacher_is_listened_to(
    supernet: Supernet, task: LanguageModelTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(RECIPE, steps=2)
    largest, smallest = supernet.space.largest(), supernet.space.smallest()
    teacher = supernet.extract(largest).eval().requires_grad_(False)
    better = validation_loss(teacher, task) < validation_loss(supernet.extract(smallest), task)
    assert recover(supernet, smallest, task, few, 0, QUIET, teacher)[1].distilled == better
    real = held_out_loss

    def judged(model: Subnet, *args: Any) -> float:
        return 0.0 if model is teacher else real(model, *args)

    monkeypatch.setattr(nas.recovery, "held_out_loss", judged)
    taught, facts = recover(supernet, smallest, task, few, 0, QUIET, teacher)
    assert facts.distilled
    undistilled = replace(few, distillation=0.0)
    alone, facts = recover(supernet, smallest, task, undistilled, 0, QUIET, teacher)
    assert not facts.distilled
    assert not torch.equal(taught.ends.head.weight, alone.ends.head.weight)


def test_the_largest_network_recovers_once_and_teaches(
    supernet: Supernet, task: LanguageModelTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Arch, Subnet | None]] = []

    def spied(source: Supernet, arch: Arch, *args: Any) -> Any:
        calls.append((arch, args[-1]))
        return recover(source, arch, *args)

    monkeypatch.setattr(nas.recovery, "recover", spied)
    largest, smallest = supernet.space.largest(), supernet.space.smallest()
    recovery = Recovery(RECIPE, 0, QUIET)
    recovery(supernet, smallest, task)
    (first, nobody), (second, teacher) = calls
    assert (first, second, nobody) == (largest, smallest, None)
    assert teacher is not None and teacher.arch == largest
    network, facts = recovery(supernet, largest, task)
    assert len(calls) == 2 and facts.loss_after == validation_loss(network, task)
    with torch.no_grad():
        network.ends.head.weight.zero_()  # a copy: whoever gets it may change it
    assert teacher.ends.head.weight.any()
    Recovery(replace(RECIPE, distillation=0.0), 0, QUIET)(supernet, smallest, task)
    assert calls[2:] == [(smallest, None)]


def test_a_loss_that_is_no_number_is_told(
    supernet: Supernet, task: LanguageModelTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Tensor:
        return torch.tensor(math.nan, requires_grad=True)

    monkeypatch.setattr(nas.recovery, "hard_loss", broken)
    with pytest.raises(TrainingDiverged, match=r"is nan at step 0 of its recovery"):
        recover(supernet, supernet.space.smallest(), task, RECIPE, 0, QUIET)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "recover_steps=-1 is negative; choose 0"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"distillation": 1.5}, "distillation=1.5 is no share"),
    ],
)
def test_recipes_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RECIPE, **values)


@pytest.mark.parametrize("steps", [1, 5, 40, 1000])
def test_learning_rates_rise_at_once_and_fall_to_zero(steps: int) -> None:
    scales = [learning_rate_scale(step, steps) for step in range(steps)]
    assert all(0 < scale <= 1 for scale in scales)
    assert scales.index(max(scales)) < 10
    if steps >= 40:
        assert scales[0] < 0.3 and max(scales) > 0.9 and scales[-1] < 0.01


@pytest.mark.slow
def test_an_exported_folder_holds_the_recovered_network(
    supernet: Supernet, task: LanguageModelTask, tmp_path: Path
) -> None:
    arch = supernet.space.smallest()
    plain = ExportSource(supernet, task, 512, weights="these")
    source = replace(plain, recovery=Recovery(RECIPE, 0, QUIET))
    with Checker() as checker:
        content = export_subnet(source, arch, tmp_path / "net", {}, checker)
        again = export_subnet(source, arch, tmp_path / "net", {}, checker)
    assert again == content, "what is recovered and verified stays"
    assert plain.facts() != source.facts()
    recovered = content["recovered"]
    assert recovered["kept"] and recovered["loss_after"] < recovered["loss_before"]
    assert recovered["test_loss"] < content["supernet_loss"]
    loss = content["formats"]["hf"]["verified"]["loss"]
    assert loss == pytest.approx(recovered["test_loss"], rel=1e-5)
    expected, _ = Recovery(RECIPE, 0, QUIET)(supernet, arch, task)
    inputs = torch.randint(0, task.vocab_size, (2, 17))
    torch.testing.assert_close(Subnet.load(tmp_path / "net")(inputs), expected(inputs))


def test_classifiers_of_images_recover(tmp_path: Path) -> None:
    task = prepare_task(TaskConfig("digits"), tmp_path / "task")
    space = SearchSpace.load("vit-small", 0, task.family_facts)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    subnet, facts = recover(supernet, space.smallest(), task, replace(RECIPE, steps=60), 0, QUIET)
    assert facts.kept and facts.loss_after < facts.loss_before
    assert subnet(task.train_batch(0, 3, 0)[0]).shape == (3, 10)
