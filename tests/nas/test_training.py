"""Training: exact resume, the schedule, and which weights an optimizer step may move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nas import training
from nas.config import TrainConfig
from nas.progress import Reporter
from nas.training import TrainingDiverged, load_supernet, read_state, train_supernet
from searchspace.errors import UserError
from searchspace.space import SearchSpace

CONFIG = TrainConfig(num_steps=6, batch_size=2, precision="fp32", warmup_steps=2)
VOCAB = 32


class CountingTask:
    """The next token is the last one plus one."""

    seq_len = 12

    def train_batch(
        self, step: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        first = torch.randint(0, VOCAB, (batch_size, 1), generator=generator)
        tokens = (first + torch.arange(self.seq_len + 1)) % VOCAB
        return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", VOCAB)


def train(
    space: SearchSpace, folder: Path, config: TrainConfig = CONFIG
) -> dict[str, torch.Tensor]:
    supernet = train_supernet(
        space, CountingTask(), config, folder, seed=3, budget_s=1e9, reporter=Reporter(quiet=True)
    )
    return supernet.state_dict()


class Stopped(BaseException):
    """Stands for a kill."""


def test_interrupted_training_ends_bit_for_bit_like_an_uninterrupted_one(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(space, tmp_path / "whole")
    # A checkpoint after every step, and a stop in the middle of the fourth.
    config = replace(CONFIG, checkpoint_s=0.0)
    step = training._Trainer.step

    def stopping(self: training._Trainer) -> dict[str, float]:
        if self.state.step == 3:
            raise Stopped
        return step(self)

    monkeypatch.setattr(training._Trainer, "step", stopping)
    with pytest.raises(Stopped):
        train(space, tmp_path / "parts", config)
    state = read_state(tmp_path / "parts")
    assert state is not None and state.step == 3 and not state.done
    monkeypatch.setattr(training._Trainer, "step", step)
    resumed = train(space, tmp_path / "parts", config)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert len(lines) == CONFIG.num_steps


def test_finished_training_is_loaded_and_not_repeated(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(space, tmp_path)

    def never(self: training._Trainer) -> dict[str, float]:
        raise AssertionError("trained again")

    monkeypatch.setattr(training._Trainer, "step", never)
    again = train(space, tmp_path)
    loaded = load_supernet(space, tmp_path).state_dict()
    assert all(
        torch.equal(trained[n], again[n]) and torch.equal(trained[n], loaded[n]) for n in trained
    )
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_training_learns(space: SearchSpace, tmp_path: Path) -> None:
    train(space, tmp_path, replace(CONFIG, num_steps=40, batch_size=4))
    import json

    losses = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[0]["largest"] == pytest.approx(3.47, abs=0.3)  # log(32)
    assert losses[-1]["largest"] < 0.5 * losses[0]["largest"]
    assert losses[-1]["random"] < losses[0]["random"]


def test_operators_that_no_arch_of_a_step_uses_are_left_alone(
    space: SearchSpace, tmp_path: Path
) -> None:
    # Only the two anchors are trained; both are softmax networks without gates.
    initial = training._Trainer(
        space, CountingTask(), CONFIG, tmp_path, 3, 1e9
    ).supernet.state_dict()
    trained = train(space, tmp_path, replace(CONFIG, num_random=0))
    gates = [n for n in trained if "gate" in n or "decay" in n or "head_norm" in n]
    assert gates
    assert all(torch.equal(initial[name], trained[name]) for name in gates)
    moved = "blocks.layer0_mixer.op.q_proj.weight"
    assert not torch.equal(initial[moved], trained[moved])


def test_diverged_training_says_so(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(self: training._Trainer, *args: object) -> tuple[float, torch.Tensor]:
        return float("nan"), torch.zeros(1)

    monkeypatch.setattr(training._Trainer, "backward", poisoned)
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
