"""Training: exact resume, the schedule, and which weights an optimizer step may move."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.config import TrainConfig, load_config
from nas.optimizers import SupernetOptimizer, is_matrix
from nas.progress import Reporter
from nas.training import TrainingDiverged, load_supernet, read_state, train_supernet
from nas.training.passes import Outcome
from nas.training.schedule import Schedule
from nas.training.state import FIRST_STAGE, MAIN_STAGE, TrainState
from nas.training.trainer import Trainer
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.counting_task import VOCAB, CountingTask, losses, make_space

CONFIG = TrainConfig(num_steps=6, batch_size=2, precision="fp32", warmup_steps=2)
STAGES = replace(
    CONFIG, first_stage_share=0.5, importance_ordering=True, attention_transfer_steps=2
)


@pytest.fixture
def space() -> SearchSpace:
    return make_space()


def train(
    space: SearchSpace, folder: Path, config: TrainConfig = CONFIG
) -> dict[str, torch.Tensor]:
    supernet = train_supernet(
        space, CountingTask(), config, folder, seed=3, budget_s=1e9, reporter=Reporter(quiet=True)
    )
    return supernet.state_dict()


class Stopped(BaseException):
    """Stands for a kill."""


def train_with_stops(
    space: SearchSpace,
    folder: Path,
    config: TrainConfig,
    stops: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, torch.Tensor]:
    """Train with a checkpoint after every step, and a kill at the start of the given steps."""
    config = replace(config, checkpoint_s=-1.0)
    step = Trainer.step
    for stop in stops:

        def stopping(self: Trainer, stop: int = stop) -> dict[str, float]:
            if self.state.step == stop:
                raise Stopped
            return step(self)

        monkeypatch.setattr(Trainer, "step", stopping)
        with pytest.raises(Stopped):
            train(space, folder, config)
        state = read_state(folder)
        assert state is not None and state.step == stop and not state.done
    monkeypatch.setattr(Trainer, "step", step)
    return train(space, folder, config)


RECIPES = {
    "default": CONFIG,
    "uniform": replace(CONFIG, sampling="uniform", num_random=2),
    "matformer": replace(CONFIG, sampling="matformer"),
    "by_size": replace(CONFIG, sampling="by_size", num_random=2),
    "stages": STAGES,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_training_ends_bit_for_bit_like_an_uninterrupted_one(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    config = RECIPES[recipe]
    whole = train(space, tmp_path / "whole", config)
    # With stages: in the first, right after the change (step 3), and in the second.
    resumed = train_with_stops(space, tmp_path / "parts", config, [2, 3, 5], monkeypatch)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timeless = [
        [{k: v for k, v in entry.items() if k != "elapsed_s"} for entry in losses(tmp_path / part)]
        for part in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == CONFIG.num_steps


def test_a_kill_while_the_stage_changes_loses_nothing(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(space, tmp_path / "whole", STAGES)
    new_teacher = Trainer.new_teacher

    def stopping(self: Trainer) -> None:
        raise Stopped  # the weights are ordered already, but nothing is written

    monkeypatch.setattr(Trainer, "new_teacher", stopping)
    with pytest.raises(Stopped):
        train(space, tmp_path / "parts", replace(STAGES, checkpoint_s=-1.0))
    monkeypatch.setattr(Trainer, "new_teacher", new_teacher)
    resumed = train(space, tmp_path / "parts", STAGES)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finished_training_is_loaded_and_not_repeated(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(space, tmp_path)

    def never(self: Trainer) -> dict[str, float]:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "step", never)
    again = train(space, tmp_path)
    loaded = load_supernet(space, tmp_path).state_dict()
    assert all(
        torch.equal(trained[n], again[n]) and torch.equal(trained[n], loaded[n]) for n in trained
    )
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_training_learns(space: SearchSpace, tmp_path: Path) -> None:
    train(space, tmp_path, replace(CONFIG, num_steps=40, batch_size=4))
    log = losses(tmp_path)
    assert log[0]["largest"] == pytest.approx(3.47, abs=0.3)  # log(32)
    assert log[-1]["largest"] < 0.5 * log[0]["largest"]
    assert log[-1]["random"] < log[0]["random"]


def test_the_first_stage_trains_the_largest_alone_and_then_it_teaches(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    taught: list[bool] = []
    backward = Trainer.backward

    def watching(self, item, batch, teacher):  # type: ignore[no-untyped-def]
        if self.teacher is not None:
            weights.append({k: v.clone() for k, v in self.teacher.state_dict().items()})
            taught.append(teacher is not None and teacher.hidden_ND is not None)
        return backward(self, item, batch, teacher)

    monkeypatch.setattr(Trainer, "backward", watching)
    train(space, tmp_path, replace(CONFIG, first_stage_share=0.5))
    roles = [set(entry) - {"step", "elapsed_s"} for entry in losses(tmp_path)]
    assert roles == [{"largest"}] * 3 + [{"largest", "smallest", "random"}] * 3
    assert len(taught) == 9 and all(taught)  # the largest is taught too
    assert all(torch.equal(weights[0][k], weights[-1][k]) for k in weights[0])
    state = read_state(tmp_path)
    assert state is not None and (state.stage, state.stage_start) == (MAIN_STAGE, 3)


def test_attention_transfer_is_left_out_without_trained_softmax(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda self, text: said.append(text))
    choices: list[dict[str, dict[str, tuple[Any, ...]]]] = [{"gla": {}, "softmax": {}}, {"gla": {}}]
    for mixers in choices:
        train(replace(space, mixers=mixers), tmp_path / str(len(mixers)), STAGES)
    assert len(said) == 2 and all("is not softmax" in text for text in said)
    assert not list(tmp_path.rglob("attention_transfer.json"))


def test_a_time_budget_covers_both_stages_and_what_is_between(
    space: SearchSpace, tmp_path: Path
) -> None:
    config = replace(STAGES, num_steps=None)
    train_supernet(
        space, CountingTask(), config, tmp_path, seed=0, budget_s=0.2, reporter=Reporter(quiet=True)
    )
    state = read_state(tmp_path)
    assert state is not None and state.done and state.stage == MAIN_STAGE
    assert state.elapsed_s >= 0.2 and state.budget_s == 0.2
    assert len(json.loads((tmp_path / "attention_transfer.json").read_text())) == 2  # one per slot


class ParityTask:
    """Which of two tokens an encoder's input starts with; some rows are not scored."""

    seq_len = 6

    def train_batch(
        self, step: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(0, VOCAB, (batch_size, self.seq_len), generator=generator)
        targets = tokens[:, 0] % 2
        tokens[:, 1:] = tokens[:, :1]
        targets[0] = -100
        return tokens, targets


def test_encoders_learn_classes_in_two_stages(space: SearchSpace, tmp_path: Path) -> None:
    encoder = replace(space, family=Family(kind="encoder", num_classes=2))
    config = replace(STAGES, num_steps=60, batch_size=16)
    train_supernet(
        encoder, ParityTask(), config, tmp_path, seed=0, budget_s=1e9, reporter=Reporter(quiet=True)
    )
    log = losses(tmp_path)
    assert log[0]["largest"] == pytest.approx(0.69, abs=0.15)  # log(2)
    assert log[-1]["largest"] < 0.3 and log[-1]["smallest"] < 0.6


def test_every_stage_warms_up_and_settles() -> None:
    schedule = Schedule(replace(CONFIG, num_steps=100, first_stage_share=0.5), 0.0)
    first = TrainState(stage=FIRST_STAGE)
    main = TrainState(stage=MAIN_STAGE, stage_start=50)
    scale = schedule.learning_rate_scale
    assert scale(first) == 0.5 and scale(replace(first, step=1)) == 1.0
    assert scale(replace(first, step=49)) == pytest.approx(0.02 / 0.6)
    assert scale(replace(main, step=50)) == 0.5 and scale(replace(main, step=60)) == 1.0
    assert scale(replace(main, step=99)) == pytest.approx(0.02 / 0.6)
    assert [schedule.norm_blend(TrainState(step=s)) for s in (0, 25, 50, 99)] == [1, 0.5, 0, 0]


def test_annealed_norms_follow_the_progress_and_survive_a_kill(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = replace(space, norm=("prepbn", "rmsnorm"))
    seen: list[float] = []
    view = Supernet.view

    def watching(self, arch, train=False):  # type: ignore[no-untyped-def]
        if train:
            seen.append(self.norm_blend)
        return view(self, arch, train)

    monkeypatch.setattr(Supernet, "view", watching)
    config = replace(CONFIG, first_stage_share=0.5, norm_anneal_share=1.0, num_random=0)
    whole = train(space, tmp_path / "whole", config)
    expected = [1 - s / 6 for s in (0, 1, 2, 3, 3, 4, 4, 5, 5)]  # two archs in the second stage
    assert seen == pytest.approx(expected)
    resumed = train_with_stops(space, tmp_path / "parts", config, [2, 4], monkeypatch)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert load_supernet(space, tmp_path / "parts").norm_blend == 0.0


def test_operators_that_no_arch_of_a_step_uses_are_left_alone(
    space: SearchSpace, tmp_path: Path
) -> None:
    # Only the two anchors are trained; both are softmax networks without gates.
    trainer = Trainer(space, CountingTask(), CONFIG, tmp_path, 3, 1e9)
    initial = trainer.supernet.state_dict()
    trained = train(space, tmp_path, replace(CONFIG, num_random=0))
    gates = [n for n in trained if "gate" in n or "decay" in n or "head_norm" in n]
    gates = [name for name in gates if "_mixer" in name]
    assert gates
    assert all(torch.equal(initial[name], trained[name]) for name in gates)
    moved = "blocks.layer0_mixer.op.q_proj.weight"
    assert not torch.equal(initial[moved], trained[moved])


def test_muon_takes_the_matrices_of_linear_maps_only(space: SearchSpace) -> None:
    def named(name: str, *shape: int) -> bool:
        return is_matrix(name, torch.nn.Parameter(torch.zeros(shape)))

    assert named("blocks.layer0_mixer.op.q_proj.weight", 4, 4)
    assert not named("blocks.layer0_mixer.op.q_conv", 4, 3)
    assert not named("blocks.layer0_ffn.norm.weight", 4)
    assert not named("ends.head.weight", 4, 4)
    # A space whose layers have no linear map has nothing for Muon.
    bare = Supernet(space, torch.Generator().manual_seed(0))
    bare.params = {name: p for name, p in bare.params.items() if not is_matrix(name, p)}
    for param in bare.params.values():
        param.grad = torch.ones_like(param)
    before = bare.params["ends.head.weight"].detach().clone()
    SupernetOptimizer(bare, 0.02, 0.003).step(1.0)
    assert not torch.equal(before, bare.params["ends.head.weight"])


def test_diverged_training_says_so(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: Trainer, *args: object) -> Outcome:
        return Outcome(torch.tensor(float("nan")))

    monkeypatch.setattr(Trainer, "backward", poisoned)
    with pytest.raises(TrainingDiverged, match="nan at step 0; lower train"):
        train(space, tmp_path)


def test_loading_what_is_not_there_or_of_another_space_is_refused(
    space: SearchSpace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="run `nas train` first"):
        load_supernet(space, tmp_path)
    train(space, tmp_path)
    with pytest.raises(UserError, match="not of space"):
        load_supernet(space.with_vocabulary(VOCAB + 1), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_supernet(space, tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampling=sandwhich", "did you mean 'sandwich'"),
        ("first_stage_share=1.0", "choose 0 to below 1"),
        ("distillation=2.0", "train.distillation=2.0 is no share; choose 0 to 1"),
        ("num_random=-1", "train.num_random=-1 is negative"),
        ("attention_transfer_steps=5", "such as train.first_stage_share=0.3"),
        ("importance_ordering=true", "such as train.first_stage_share=0.3"),
    ],
)
def test_recipes_that_cannot_be_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [f"train.{setting}"])
