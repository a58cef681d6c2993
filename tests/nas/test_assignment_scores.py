"""Scores of blocks on a supernet, their costs, and the programmes they make."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hw_profiles.latency_table import LatencyTable
from hw_profiles.latency_table.correction import Correction, Spill
from nas.assignment.assign import assign, front, reasons, sweep
from nas.assignment.choices import LayerChoices, joined
from nas.assignment.costs import cost_model
from nas.assignment.depth import block_influence, skipped_by_depth
from nas.assignment.problem import Limit
from nas.assignment.programmes import DepthProgramme, depth_programmes
from nas.assignment.restrict import only
from nas.assignment.score_file import ScoreFile
from nas.assignment.scores import Scorer, WidthScores
from nas.candidates import Prices
from nas.evaluation import held_out_loss
from nas.tasks.language_model import LanguageModelTask
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

FEW = ("mixer=softmax,gla,none", "heads=4x4,2x1", "mixer_precision=fp32", "position=rope",
       "ffn=relu2", "ffn_precision=fp32", "intermediate_size=128,0")  # fmt: skip


class Count:
    """A progress bar that counts, and stops the work after some updates."""

    def __init__(self, stop_after: float = math.inf) -> None:
        self.updates, self._stop_after = 0, stop_after

    def update(self, done: float, text: str = "") -> None:
        self.updates += 1
        if self.updates > self._stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def few(space: SearchSpace) -> SearchSpace:
    """Eight mixers and four FFNs per layer, two norms."""
    return only(space, FEW)


@pytest.fixture
def scorer(supernet: Supernet, task: LanguageModelTask) -> Scorer:
    batches = task.evaluation_batches("validation", 128, 2)
    return Scorer(supernet, task, batches, ScoreFile(None, "key"))


@pytest.fixture
def corrected(table: LatencyTable) -> LatencyTable:
    """The table with a correction of every kind: scales, once per trait, two spills."""
    spills = (Spill(0.05, 0.2, 40.0, 0.1), Spill(0.1, 0.3, -10.0, 0.05))
    fit = Correction(
        1.1, 3.0, -20.0, {"mixer gla": 0.2}, {"mixer gla": 30.0, "layernorm": -4.0, "ends": 2.0},
        spills,
    )  # fmt: skip
    return replace(table, corrections={w.name: fit for w in table.workloads})


def test_scores_are_the_losses_of_networks_with_one_block_replaced(
    few: SearchSpace, scorer: Scorer, supernet: Supernet, task: LanguageModelTask
) -> None:
    choices = LayerChoices.of(few, 64)
    scores = scorer.score(choices, Count())
    batches = task.evaluation_batches("validation", 128, 2)

    def loss(slot: int, layer: LayerArch) -> float:
        return held_out_loss(supernet.view(choices.with_layer(slot, layer)), batches, task)

    reference = choices.reference.layers[0]
    assert scores.loss == pytest.approx(loss(0, reference), rel=1e-6)
    assert scores.mixers.shape == (3, len(choices.mixers)) and len(choices.mixers) == 10
    assert scores.ffns.shape == (3, len(choices.ffns)) and len(choices.ffns) == 4
    for slot in range(3):
        for number, mixer in enumerate(choices.mixers):
            beside = choices.reference_half("ffn", mixer.norm)
            wanted = loss(slot, joined(mixer, beside)) - scores.loss
            assert scores.mixers[slot, number] == pytest.approx(wanted, abs=2e-6)
        assert scores.skips[slot] == pytest.approx(loss(slot, LayerArch()) - scores.loss, abs=2e-6)
    # The scores of a layer add up to what was evaluated, under the other norm as well.
    for ffn, score in zip(choices.ffns, scores.ffns[1], strict=True):
        mixer = choices.reference_half("mixer", ffn.norm)
        total = scores.mixers[1, choices.mixers.index(mixer)] + score
        assert total == pytest.approx(loss(1, joined(mixer, ffn)) - scores.loss, abs=3e-6)


def test_a_killed_scoring_goes_on_where_it_was(
    few: SearchSpace, supernet: Supernet, task: LanguageModelTask, tmp_path: Path
) -> None:
    path, choices = tmp_path / "scores.jsonl", LayerChoices.of(few, 32)
    batches = task.evaluation_batches("validation", 64, 1)
    with pytest.raises(KeyboardInterrupt):
        Scorer(supernet, task, batches, ScoreFile(path, "k")).score(choices, Count(10))
    kept = len(path.read_text().splitlines())
    assert kept == 12  # the reference, and one for every update that was begun
    path.write_text(path.read_text() + '{"key": "k", "name": "to')  # killed while writing

    second = Count()
    scores = Scorer(supernet, task, batches, ScoreFile(path, "k")).score(choices, second)
    whole = Scorer(supernet, task, batches, ScoreFile(None, "k")).score(choices, count := Count())
    assert second.updates == count.updates - 11
    for name in ("mixers", "ffns", "skips", "influence"):
        assert np.array_equal(getattr(scores, name), getattr(whole, name))
    third = Count()
    Scorer(supernet, task, batches, ScoreFile(path, "k")).score(choices, third)
    assert third.updates == 1
    assert len(ScoreFile(path, "other weights")) == 0
    lines = [line for line in path.read_text().splitlines() if not line.endswith('"to')]
    names = [json.loads(line)["name"] for line in lines]
    assert len(names) == len(set(names))


def test_a_choice_that_cannot_be_evaluated_is_left_out(
    few: SearchSpace, scorer: Scorer, supernet: Supernet, table: LatencyTable
) -> None:
    # A parameter that only the gated linear mixer has.
    own = [
        n for n in supernet.params if "layer1_mixer" in n and "proj" not in n and "norm" not in n
    ]
    supernet.params[own[0]].detach().fill_(math.nan)
    choices = LayerChoices.of(few, 64)
    scores = scorer.score(choices, Count())
    spoilt = np.isinf(scores.mixers[1])
    assert spoilt.any() and not spoilt.all() and np.isfinite(scores.mixers[[0, 2]]).all()
    model = cost_model(few, table, "prefill_b1_t64")
    (programme, *_) = depth_programmes(scores, model, 3, "influence", lambda slots: scores.loss)
    assert len(programme.problem.slots[2]) == (~spoilt).sum()


def test_block_influence_is_one_minus_cosine() -> None:
    before = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    after = torch.tensor([[[2.0, 0.0], [1.0, 0.0]]])
    assert block_influence(before, before) == pytest.approx(0.0)
    assert block_influence(before, after) == pytest.approx(0.5)


def genotype_costs(
    space: SearchSpace, table: LatencyTable, archs: list[Arch]
) -> dict[str, list[float]]:
    prices = Prices(space, table, "prefill_b1_t64")
    rows = np.stack([space.encode(arch) for arch in archs])
    names = ("weight_bytes", "params", "latency_ms", "decode_ms")
    return {name: prices.of(name, rows).tolist() for name in names}


def random_scores(space: SearchSpace, d_model: int, seed: int = 0) -> WidthScores:
    rng, choices = np.random.default_rng([seed, d_model]), LayerChoices.of(space, d_model)
    num = space.num_layers
    return WidthScores(
        choices, 2.0, rng.uniform(0, 1, (num, len(choices.mixers))),
        rng.uniform(0, 1, (num, len(choices.ffns))), rng.uniform(0, 1, num), rng.uniform(0, 1, num),
    )  # fmt: skip


def programmes_of(
    space: SearchSpace, table: LatencyTable, order: str = "influence", seed: int = 0
) -> Iterator[DepthProgramme]:
    model = cost_model(space, table, "prefill_b1_t64")
    for d_model in space.d_model:
        yield from depth_programmes(
            random_scores(space, d_model, seed), model, space.min_depth, order,
            lambda slots: 2.0 + 1.5 * len(slots),
        )  # fmt: skip


@pytest.mark.parametrize("order", ["influence", "additive"])
def test_costs_are_those_of_the_table_and_of_the_search(
    space: SearchSpace, corrected: LatencyTable, order: str
) -> None:
    rng = np.random.default_rng(0)
    for programme in programmes_of(space, corrected, order):
        problem = programme.problem
        choices: list[tuple[int, ...]] = []
        while len(choices) < 5:
            choice = tuple(int(rng.integers(len(slot))) for slot in problem.slots)
            if problem.allowed(choice):
                choices.append(choice)
        archs = [programme.arch(choice) for choice in choices]
        for name, wanted in genotype_costs(space, corrected, archs).items():
            assert [problem.cost(name, c) for c in choices] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("depth", [3, 2])
def test_the_best_assignment_is_that_of_trying_every_network(
    few: SearchSpace, table: LatencyTable, depth: int
) -> None:
    tiny = only(few, ["norm=layernorm,rmsnorm", "heads=4x4", "d_model=64"])
    programme = next(p for p in programmes_of(tiny, table) if len(p.stay) == depth)
    problem = programme.problem
    model_limit = Limit("latency_ms", 0.7 * table.latency_ms(
        programme.reference, table.workloads[0]))  # fmt: skip
    found = assign([programme], [model_limit])
    scores = {}
    for choice in itertools.product(*(range(len(slot)) for slot in problem.slots)):
        if problem.allowed(choice):
            arch = programme.arch(choice)
            assert arch.depth == depth
            if table.latency_ms(arch, table.workloads[0]) <= model_limit.value:
                scores[arch.id] = problem.score(choice)
    assert found.status == "optimal" and found.gap == 0.0
    best = found.found[0]
    assert scores[best.arch.id] == pytest.approx(min(scores.values()), abs=1e-6)
    assert best.predicted_loss == pytest.approx(min(scores.values()), abs=1e-6)


def test_every_assignment_is_an_arch_of_the_space_and_keeps_the_limits(
    space: SearchSpace, corrected: LatencyTable
) -> None:
    limits = [Limit("latency_ms", 0.35), Limit("weight_bytes", 150_000), Limit("params", 2e4, True)]
    found = assign(list(programmes_of(space, corrected)), limits)
    assert len(found.found) > 2
    for item in found.found:
        space.encode(item.arch)
        assert not item.exact and item.arch.depth >= space.min_depth
        assert item.costs["latency_ms"] == pytest.approx(
            corrected.latency_ms(item.arch, corrected.workloads[0])
        )
        assert all(limit.keeps(item.costs[limit.metric]) for limit in limits)
    losses = [item.predicted_loss for item in found.found]
    assert losses == sorted(losses)


def test_a_sweep_is_a_front_and_impossible_limits_have_a_reason(
    few: SearchSpace, table: LatencyTable
) -> None:
    programmes = list(programmes_of(few, table))
    limits = [Limit("latency_ms", 1.0)]
    budgets = list(sweep(programmes, limits, "weight_bytes", 4))
    best = [budget.found[0] for budget in budgets]
    assert [i.predicted_loss for i in best] == sorted(i.predicted_loss for i in best)
    sizes = [item.costs["weight_bytes"] for item in best]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[-1]
    places = front(best, "weight_bytes", [item.predicted_loss for item in best])
    assert {best[i].arch.id for i in places} == {item.arch.id for item in best}
    assert [sizes[i] for i in places] == sorted(sizes[i] for i in places)
    least = sizes[-1]
    diagnosis = reasons(programmes, [*limits, Limit("weight_bytes", 0.5 * least)])
    assert [limit.metric for limit in diagnosis.blocking] == ["weight_bytes"]
    assert diagnosis.nearest["weight_bytes"] == pytest.approx(least)


def loss_with_twins(skipped: frozenset[int]) -> float:
    """Layers 1 and 2 do the same: either can go for almost nothing, both for a lot."""
    single = {0: 0.05, 1: 0.01, 2: 0.02, 3: 0.08}
    return 2.0 + sum(single[slot] for slot in skipped) + 1.0 * ({1, 2} <= skipped)


def test_additive_scores_drop_both_of_two_layers_that_stand_for_each_other(
    space: SearchSpace, table: LatencyTable
) -> None:
    """Where depth is left to additive scores, a network a nat worse than need be is chosen."""
    deep = replace(only(space, [*FEW[:-1], "intermediate_size=128", "norm=layernorm", "d_model=64",
                                "mixer=softmax", "heads=4x4"]), num_layers=4)  # fmt: skip
    choices = LayerChoices.of(deep, 64)
    skips = np.array([loss_with_twins(frozenset({slot})) - 2.0 for slot in range(4)])
    influence = np.array([0.1, 0.5, 0.6, 0.9])
    scores = WidthScores(choices, 2.0, np.zeros((4, 1)), np.zeros((4, 1)), skips, influence)
    model = cost_model(deep, table, "prefill_b1_t64")
    reached = {}
    for order in ("additive", "influence", "greedy", "best"):
        programmes = list(depth_programmes(scores, model, 1, order, loss_with_twins))
        problem = programmes[0].problem
        layer = sum(float(slot.costs["weight_bytes"][0]) for slot in problem.slots[:2])
        half = Limit("weight_bytes", problem.fixed["weight_bytes"] + 2 * layer)
        arch = assign(programmes, [half]).found[0].arch
        skipped = frozenset(slot for slot, layer in enumerate(arch.layers) if layer.skip)
        reached[order] = loss_with_twins(skipped)
    assert reached["additive"] == pytest.approx(3.03)
    assert reached["influence"] == reached["greedy"] == reached["best"] == pytest.approx(2.06)


def test_the_layers_to_skip_follow_their_order() -> None:
    influence, skips = [0.9, 0.2, 0.4, 0.6], [0.05, 0.01, 0.02, 0.08]

    def order(name: str, min_depth: int = 1) -> list[set[int]]:
        found = skipped_by_depth(name, influence, skips, min_depth, loss_with_twins)
        return [set(slots) for slots in found]

    assert order("influence") == [set(), {1}, {1, 2}, {1, 2, 3}]
    assert order("skip-loss") == [set(), {1}, {1, 2}, {0, 1, 2}]
    assert order("greedy", 2) == [set(), {1}, {0, 1}]
    assert order("best") == [set(), {1}, {0, 1}, {0, 1, 3}]


def test_shared_keys_are_left_out(task: LanguageModelTask) -> None:
    space = SearchSpace.load("decoder-attention", task.vocab_size)
    choices = LayerChoices.of(space, 64)
    assert True in space.kv_shared and len(choices.mixers) > 10
    assert not any(choice.layer.kv_shared for choice in choices.mixers)
    assert not any(layer.kv_shared for layer in choices.reference.layers)


def test_only_says_what_there_is(space: SearchSpace) -> None:
    assert only(space, ["d_model=32", "ffn=swiglu"]).d_model == (32,)
    for text, words in (
        ("width=3", "unknown gene 'width'"),
        ("mixer=softmaxx", "did you mean 'softmax'"),
        ("mixer", "is not understood"),
    ):
        with pytest.raises(UserError, match=words):
            only(space, [text])
