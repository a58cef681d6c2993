"""Archs that recur as CUDA graphs: the same training, on a made-up GPU."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas.arch_sampling import ArchSampler
from nas.config import TrainConfig
from nas.progress import Reporter
from nas.training import graphs, train_supernet
from nas.training.graphs import Graphs
from nas.training.trainer import Trainer
from searchspace.space import SearchSpace
from tests.counting_task import CountingTask, losses, make_space
from tests.nas.fake_graphs import FakeGraphs, fake  # noqa: F401

CONFIG = TrainConfig(num_steps=7, batch_size=2, precision="fp32", warmup_steps=2)
RECIPES = {
    "sandwich": CONFIG,
    "without teacher": replace(CONFIG, distillation=0.0),
    "fixed list": replace(CONFIG, sampling="matformer"),
    "random only": replace(CONFIG, sampling="uniform", num_random=2),
}


class PartlyScored(CountingTask):
    """Counting; another number of targets is scored in every step."""

    def train_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().train_batch(step, batch_size, seed)
        targets = targets.clone()
        targets[0, : 3 + step % 4] = -100
        return inputs, targets


def train(
    folder: Path, config: TrainConfig, task: CountingTask, space: SearchSpace | None = None
) -> dict[str, Tensor]:
    supernet = train_supernet(
        space or make_space(), task, config, folder, seed=3, budget_s=1e9,
        reporter=Reporter(quiet=True),
    )  # fmt: skip
    return supernet.state_dict()


def assert_same(folder: Path, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Weights and logs are those of the other training, bit for bit."""
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one, other in zip(losses(folder / "one"), losses(folder / "other"), strict=True):
        assert {**one, "elapsed_s": 0} == {**other, "elapsed_s": 0}


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_steps_train_the_same(
    tmp_path: Path, request: pytest.FixtureRequest, recipe: str
) -> None:
    config = RECIPES[recipe]
    plain = train(tmp_path / "one", config, CountingTask())
    gpu: FakeGraphs = request.getfixturevalue("fake")
    replayed = train(tmp_path / "other", config, CountingTask())
    assert_same(tmp_path, plain, replayed)
    assert (gpu.captured, gpu.replays) == expected_graphs(config)


def expected_graphs(config: TrainConfig) -> tuple[int, int]:
    """Return how many archs come a third time, and how often from then on."""
    sampler = ArchSampler(config.sampling, make_space(), config.num_random, 3)
    archs = [item for step in range(config.num_steps or 0) for item in sampler.archs(step)]
    counts = Counter((item.role, item.arch) for item in archs)
    replays = [count - 2 for count in counts.values() if count > 2]
    return len(replays), sum(replays)


def test_a_stage_has_graphs_of_its_own(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = replace(CONFIG, num_steps=10, first_stage_share=0.5, attention_transfer_steps=1)
    config = replace(config, importance_ordering=True, num_random=0)
    plain = train(tmp_path / "one", config, CountingTask())
    gpu: FakeGraphs = request.getfixturevalue("fake")
    replayed = train(tmp_path / "other", config, CountingTask())
    assert_same(tmp_path, plain, replayed)
    # The largest alone; then the frozen teacher, the largest and the smallest.
    assert (gpu.captured, gpu.replays) == (1 + 3, 3 + 3 * 3)


def test_positions_that_are_not_scored_need_no_new_graph(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain = train(tmp_path / "one", CONFIG, PartlyScored())
    gpu: FakeGraphs = request.getfixturevalue("fake")
    replayed = train(tmp_path / "other", CONFIG, PartlyScored())
    assert (gpu.captured, gpu.replays) == expected_graphs(CONFIG)
    for one, other in zip(losses(tmp_path / "one"), losses(tmp_path / "other"), strict=True):
        assert {**one, "elapsed_s": 0} == pytest.approx({**other, "elapsed_s": 0}, rel=1e-3)
    for name, tensor in plain.items():
        torch.testing.assert_close(replayed[name], tensor, rtol=0.05, atol=0.02)


def test_annealed_norms_are_captured_when_they_stay_as_they_are(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    space = replace(make_space(), norm=("prepbn", "rmsnorm"))
    config = replace(CONFIG, norm_anneal_share=0.3, num_random=0)
    plain = train(tmp_path / "one", config, CountingTask(), space)
    gpu: FakeGraphs = request.getfixturevalue("fake")
    replayed = train(tmp_path / "other", config, CountingTask(), space)
    assert_same(tmp_path, plain, replayed)
    # The smallest has other norms; the largest blends in steps 0 to 2.
    assert gpu.captured == 2 and gpu.replays < 10


def test_what_cannot_be_captured_runs_plainly_and_is_said_once(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(tmp_path / "one", CONFIG, CountingTask())
    gpu: FakeGraphs = request.getfixturevalue("fake")
    gpu.refuses = "operation not permitted when stream is capturing"
    with caplog.at_level(logging.WARNING):
        replayed = train(tmp_path / "other", CONFIG, CountingTask())
    assert_same(tmp_path, plain, replayed)
    said = [r.message for r in caplog.records if gpu.refuses in r.message]
    whole = [text.partition(" is run")[0] for text in said]
    assert whole[:2] == ["the largest network", "the smallest network"]
    assert len(set(whole)) == len(whole)
    assert gpu.replays == 0


def test_too_little_memory_for_a_graph_is_survived(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tmp_path / "one", CONFIG, CountingTask())
    request.getfixturevalue("fake")

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(graphs, "capture", full)
    assert_same(tmp_path, plain, train(tmp_path / "other", CONFIG, CountingTask()))


def test_resuming_captures_anew(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tmp_path / "one", CONFIG, CountingTask())
    gpu: FakeGraphs = request.getfixturevalue("fake")
    step = Trainer.step

    def stopping(self: Trainer) -> dict[str, float]:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self)

    config = replace(CONFIG, checkpoint_s=-1.0)
    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "other", config, CountingTask())
    monkeypatch.setattr(Trainer, "step", step)
    assert_same(tmp_path, plain, train(tmp_path / "other", config, CountingTask()))
    assert gpu.captured == 2 + 2  # the largest and the smallest, before and after


def test_graphs_are_few_and_calls_keep_apart(
    fake: FakeGraphs,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graphs, "MAX_COUNTED", 4)
    total = torch.zeros(3)
    run_all = Graphs(torch.device("cpu"), lambda: [total])

    def times(factor: int, x: Tensor) -> Tensor:
        def run(inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            (given,) = inputs
            assert given is not None
            total[: len(given)] += factor * given
            return (factor * given,)

        (out,) = run_all(f"call {factor}", factor, run, (x,))
        assert out is not None
        return out.clone()

    expected = torch.zeros(3)
    with caplog.at_level(logging.WARNING):
        for turn in range(5):
            for factor in (1, 2, 3):
                x = torch.full((3,), float(turn + factor))
                assert torch.equal(times(factor, x), factor * x)
                expected += factor * x
    assert torch.equal(total, expected)
    assert fake.captured == 2 and fake.replays == 6
    assert [r.message for r in caplog.records] == [
        "call 3 is run operator by operator, not as a CUDA graph: 2 graphs are held already"
    ]
    # Another shape is another call.
    assert not run_all.has(1, (torch.ones(2),)) and run_all.has(1, (torch.ones(3),))
    run_all.forget()
    assert not run_all.has(1, (torch.ones(3),))
