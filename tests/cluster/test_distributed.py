"""Training by several processes: the same result as one, whatever their number; no Ray here."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nas.arch_sampling import ArchSampler, StepArch
from nas.config import TrainConfig
from nas.progress import Reporter
from nas.training import load_supernet, read_state, train_supernet
from nas.training.distributed import Ranks, buckets
from nas.training.passes import Outcome
from nas.training.team import Share, spread
from nas.training.trainer import Trainer
from searchspace.family import Family
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from tests.counting_task import VOCAB, CountingTask, losses, make_space

CONFIG = TrainConfig(num_steps=6, batch_size=4, precision="fp32", warmup_steps=2, num_random=2)
RECIPES = {
    "sandwich": CONFIG,
    "no teacher": replace(CONFIG, sampling="uniform"),
    "matformer": replace(CONFIG, sampling="matformer"),
    "two stages": replace(
        CONFIG, first_stage_share=0.5, importance_ordering=True, attention_transfer_steps=2
    ),
}


class PartlyScored(CountingTask):
    """Counting; some targets are not scored."""

    def train_batch(
        self, step: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = super().train_batch(step, batch_size, seed)
        targets = targets.clone()
        targets[0, :7] = -100  # halves of the batch do not weigh the same
        return inputs, targets


def train(folder: Path, config: TrainConfig, space: SearchSpace | None = None) -> None:
    team = Ranks() if dist.is_initialized() else None
    train_supernet(
        space or make_space(), PartlyScored(), config, folder, seed=3, budget_s=1e9,
        reporter=Reporter(quiet=True), team=team,
    )  # fmt: skip


def run_together(size: int, folder: Path, work: Callable[[], None]) -> list[str]:
    """Run a function in `size` processes of one group; return what went wrong in each."""
    context = multiprocessing.get_context("fork")
    store = folder.with_name(f"{folder.name}.store{len(list(folder.parent.iterdir()))}")

    def member(rank: int) -> None:
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size
            )
            work()
            dist.destroy_process_group()
        except BaseException:
            store.with_name(f"{store.name}.{rank}.error").write_text(traceback.format_exc())
        finally:
            os._exit(0)

    members = [context.Process(target=member, args=(rank,)) for rank in range(size)]
    for process in members:
        process.start()
    for process in members:
        process.join(60)
    errors = [store.with_name(f"{store.name}.{rank}.error") for rank in range(size)]
    return [path.read_text() for path in errors if path.exists()]


def moved_apart(one: Path, other: Path) -> float:
    """Return how far two trainings ended from each other, in shares of the way from the start."""
    start = Supernet(make_space(), torch.Generator().manual_seed(3)).state_dict()
    first, second = (load_supernet(make_space(), path).state_dict() for path in (one, other))
    apart = sum(float((first[n] - second[n]).square().sum()) for n in start)
    way = sum(float((first[n] - start[n]).square().sum()) for n in start)
    return (apart / way) ** 0.5


def assert_same_training(one: Path, other: Path) -> None:
    """Only the rounding of differently ordered sums may differ.

    Muon computes in bf16 and AdamW divides by the gradient's own size, so both enlarge it.
    """
    assert moved_apart(one, other) < 0.02
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a if k != "elapsed_s")


@pytest.mark.parametrize(
    ("recipe", "size"),
    [("sandwich", 2), ("sandwich", 3), ("sandwich", 6), ("no teacher", 2), ("matformer", 3),
     ("two stages", 2), ("two stages", 6)],
)  # fmt: skip
def test_processes_together_train_what_one_trains(tmp_path: Path, recipe: str, size: int) -> None:
    config = RECIPES[recipe]
    train(tmp_path / "one", config)
    folder = tmp_path / "many"
    assert run_together(size, folder, lambda: train(folder, config)) == []
    assert_same_training(tmp_path / "one", folder)
    assert len(losses(folder)) == 6


def gradients(folder: Path, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step, None left out."""
    team = Ranks() if dist.is_initialized() else None
    trainer = Trainer(make_space(), PartlyScored(), config, folder, 3, 1e9, team)
    trainer.restore()
    trainer.step()
    params = dict(trainer.supernet.named_parameters())
    return {name: param.grad for name, param in params.items() if param.grad is not None}


@pytest.mark.parametrize("size", [2, 5])
def test_the_gradients_of_a_step_are_those_of_one_process(tmp_path: Path, size: int) -> None:
    alone = gradients(tmp_path / "one", CONFIG)

    def work() -> None:
        # Inside: every process has all gradients after the sum.
        together = gradients(tmp_path / "many", CONFIG)
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            error = (together[name] - expected).double().norm()
            assert error < 1e-5 * expected.double().norm() + 1e-7, name

    assert run_together(size, tmp_path / "many", work) == []
    assert len(alone) < len(list(Supernet(make_space(), torch.Generator()).named_parameters()))


def test_another_number_of_processes_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    config = replace(RECIPES["two stages"], checkpoint_s=-1.0)
    train(tmp_path / "one", config)
    folder = tmp_path / "many"
    step = Trainer.step

    def work_until(stop: int) -> None:
        def stopping(self: Trainer) -> dict[str, float]:
            if self.state.step == stop:
                raise KeyboardInterrupt
            return step(self)

        Trainer.step = stopping  # type: ignore[method-assign]  # in a process of its own
        train(folder, config)

    for size, stop in [(2, 2), (3, 4), (1, 5)]:
        errors = run_together(size, folder, lambda stop=stop: work_until(stop))  # type: ignore[misc]
        assert len(errors) == size and all("KeyboardInterrupt" in text for text in errors)
        state = read_state(folder)
        assert state is not None and state.step == stop and not state.done
    assert run_together(2, folder, lambda: train(folder, config)) == []
    assert_same_training(tmp_path / "one", folder)


def test_the_clock_of_the_first_process_counts(tmp_path: Path) -> None:
    config = replace(CONFIG, num_steps=None, first_stage_share=0.3, checkpoint_s=0.05)

    def work() -> None:
        train_supernet(
            make_space(), PartlyScored(), config, tmp_path / "run", seed=0, team=Ranks(),
            budget_s=0.3 if dist.get_rank() == 0 else 1e9, reporter=Reporter(quiet=True),
        )  # fmt: skip

    assert run_together(2, tmp_path / "run", work) == []
    state = read_state(tmp_path / "run")
    assert state is not None and state.done and 0.3 <= state.elapsed_s < 5.0


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    def work_in(folder: Path) -> None:
        own = folder if dist.get_rank() == 0 else tmp_path / "elsewhere"
        train(own, CONFIG)

    train(tmp_path / "run", CONFIG)
    errors = run_together(2, tmp_path / "run", lambda: work_in(tmp_path / "run"))
    assert any(
        "holds no checkpoint for process 1 and model.safetensors for process 0" in text
        for text in errors
    )


def test_a_loss_that_is_no_number_ends_every_process(tmp_path: Path) -> None:
    def work() -> None:
        if dist.get_rank() == 1:
            nan = Outcome(torch.tensor(float("nan")))
            Trainer.backward = lambda self, *args: nan  # type: ignore[method-assign]
        train(tmp_path / "run", CONFIG)

    errors = run_together(2, tmp_path / "run", work)
    assert len(errors) == 2 and all("the loss of the smallest network is nan" in e for e in errors)


class ClassTask:
    """Sequences of which one class each is told; most of them are not scored."""

    seq_len = 6

    def train_batch(
        self, step: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(0, VOCAB, (batch_size, self.seq_len), generator=generator)
        targets = tokens[:, 0] % 2
        targets[1:] = -100
        return tokens, targets


def test_rows_without_a_target_need_no_process(tmp_path: Path) -> None:
    space = replace(make_space(), family=Family(kind="encoder", num_classes=2))
    config = replace(CONFIG, num_random=0, num_steps=2)

    def train_classes(folder: Path) -> None:
        team = Ranks() if dist.is_initialized() else None
        train_supernet(space, ClassTask(), config, folder, seed=3, budget_s=1e9,
                       reporter=Reporter(quiet=True), team=team)  # fmt: skip

    train_classes(tmp_path / "one")
    assert run_together(5, tmp_path / "many", lambda: train_classes(tmp_path / "many")) == []
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "many"), strict=True):
        assert a["largest"] == pytest.approx(b["largest"], rel=1e-4)


def sandwich_step(num_random: int) -> Sequence[StepArch]:
    return ArchSampler("sandwich", make_space(), num_random, 0).archs(0)


def test_the_largest_is_for_the_first_process_and_the_smallest_for_the_second() -> None:
    archs = sandwich_step(2)
    whole = slice(0, 8)
    assert spread(archs, 8, 1) == [Share((0, 1, 2, 3), whole)]
    two = spread(archs, 8, 2)
    assert [share.archs[0] for share in two] == [0, 1] and all(s.rows == whole for s in two)
    assert sorted(place for share in two for place in share.archs) == [0, 1, 2, 3]
    assert spread(archs, 8, 4) == [Share((i,), whole) for i in range(4)]


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_every_arch_sees_every_row_once(size: int, num_rows: int) -> None:
    archs = sandwich_step(1)
    shares = spread(archs, num_rows, size)
    assert len(shares) == size
    for place in range(len(archs)):
        rows = [r for s in shares if place in s.archs for r in range(num_rows)[s.rows]]
        assert sorted(rows) == list(range(num_rows))
    busy = [share for share in shares if share.archs]
    assert len(busy) >= min(size, len(archs))


def test_large_parameters_and_other_types_get_buckets_of_their_own() -> None:
    sizes = [9 << 18, 9 << 20, 1, 2]
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    params.append(torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    assert [[p.numel() for p in bucket] for bucket in buckets(params)] == [
        [9 << 18], [9 << 20], [1, 2], [3],
    ]  # fmt: skip
    assert list(buckets([])) == []
