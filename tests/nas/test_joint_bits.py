"""Spaces with fewer choices, bits of settled archs, and many candidates scored at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from hw_profiles.latency_table import LatencyTable
from nas.candidates import Objectives, Prices, SpaceCodec, genes_of
from nas.pareto import non_dominated
from predictors.encodings import GeneEncoding, LazyFeatures
from predictors.models.prior_ridge import PriorRidge
from searchspace.arch import Arch
from searchspace.cost import arch_cost, num_params, weight_bytes
from searchspace.errors import UserError
from searchspace.space import SearchSpace
from tests.benchmarks import joint_bits, million_candidates
from tests.benchmarks._bits_search import ARMS, Arms, BitsCodec, Point
from tests.benchmarks._inherited_losses import Losses

optuna.logging.set_verbosity(optuna.logging.ERROR)

BITS = ("mixer_precision", "ffn_precision")
OBJECTIVES = ("loss", "latency_ms", "weight_bytes")


def loss(arch: Arch) -> float:
    """Falls with size; rounding costs more in the first layer."""
    value = 4.0 - 0.1 * float(np.log(arch_cost(arch, num_params)))
    for slot, layer in enumerate(arch.layers):
        rounded = [layer.mixer_precision, layer.ffn_precision].count("int8")
        value += 0.0 if layer.skip else rounded * 0.02 / (1 + slot)
    return value


def without_bits(arch: Arch) -> dict[str, Any]:
    values = arch.to_dict()
    for layer in values["layers"]:
        for name in BITS:
            layer.pop(name, None)
    return values


def bits_of(arch: Arch) -> set[str]:
    return {spec.precision for _, spec in arch.named_sub_blocks()}


@pytest.fixture
def arms(space: SearchSpace, table: LatencyTable) -> Arms:
    return Arms(space, table, "prefill_b1_t64", OBJECTIVES, loss)


class TestRestricted:
    def test_its_archs_are_those_of_the_space_with_these_choices(self, space: SearchSpace) -> None:
        part = space.restricted(mixer_precision=["fp32"], heads=["4x2", "2x1"], norm=["rmsnorm"])
        assert part.heads == ((4, 2), (2, 1)) and part.norm == ("rmsnorm",)
        assert part.ffn_precision == space.ffn_precision and part.min_depth == space.min_depth
        for genotype in part.sample_genotypes(np.random.default_rng(0), 30):
            arch = part.decode(genotype)
            assert space.decode(space.encode(arch)) == arch

    def test_sizes_of_parts_add_up(self, space: SearchSpace) -> None:
        widths = [space.restricted(d_model=[width]).size() for width in space.d_model]
        assert sum(widths) == space.size()

    def test_options_and_their_operators(self, space: SearchSpace) -> None:
        part = space.restricted(mixer=["sliding_window", "gla"], **{"sliding_window.window": [16]})
        assert dict(part.mixers) == {"sliding_window": {"window": (16,)}, "gla": {}}

    def test_without_skipping_every_layer_is_there(self, space: SearchSpace) -> None:
        part = space.restricted(skip=[False])
        assert part.min_depth == part.num_layers
        assert not any("skip" in name for name in part.genes)

    def test_nothing_restricted_is_the_same_space(self, space: SearchSpace) -> None:
        assert space.restricted() == space

    def test_costs_are_those_of_the_space(self, space: SearchSpace, table: LatencyTable) -> None:
        part = space.restricted(ffn=["swiglu"], mixer_precision=["int8"])
        rows = part.sample_genotypes(np.random.default_rng(1), 20)
        in_space = np.array([space.encode(part.decode(row)) for row in rows])
        prices, whole = (Prices(s, table, "prefill_b1_t64") for s in (part, space))
        assert (prices.of("latency_ms", rows) == whole.of("latency_ms", in_space)).all()

    @pytest.mark.parametrize(
        ("choices", "sentence"),
        [
            ({"hads": ["4x4"]}, "did you mean 'heads'"),
            ({"heads": ["4x3"]}, "unknown choice of heads '4x3': did you mean '4x"),
            ({"mixer": "gla"}, "give a list"),
            ({"skip": [True]}, "leaves no layer"),
            ({"norm": []}, "norm has no choices"),
        ],
    )
    def test_mistakes(self, space: SearchSpace, choices: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            space.restricted(**choices)


class TestBitsCodec:
    @pytest.fixture
    def codec(self, space: SearchSpace, arms: Arms) -> BitsCodec:
        small = space.uniform(depth=2, mixer="gla", intermediate_size=0, d_model=32)
        points = [Point(arch, (loss(arch),)) for arch in (space.largest(), small)]
        return BitsCodec(space, arms.whole, points)

    def test_only_bits_change(self, space: SearchSpace, codec: BitsCodec) -> None:
        rng = np.random.default_rng(0)
        matrix = np.stack([rng.integers(0, g.num_levels, 40) for g in codec.genes], axis=1)
        settled = [without_bits(space.decode(row)) for row in codec.bases]
        for row, genotype in zip(matrix, codec.genotypes(matrix), strict=True):
            assert without_bits(space.decode(genotype)) == settled[row[0]]

    def test_equal_rows_are_equal_archs(self, space: SearchSpace, codec: BitsCodec) -> None:
        rng = np.random.default_rng(1)
        matrix = np.stack([rng.integers(0, g.num_levels, 60) for g in codec.genes], axis=1)
        rows = codec.canonical(matrix)
        ids = [space.decode(genotype).id for genotype in codec.genotypes(matrix)]
        assert len(np.unique(rows, axis=0)) == len(set(ids)) < 60
        assert (codec.canonical(rows) == rows).all()

    def test_costs_and_features(self, space: SearchSpace, codec: BitsCodec) -> None:
        archs = [space.decode(genotype) for genotype in codec.genotypes(codec.known)]
        assert codec.exact_objectives(codec.known)[:, 1].tolist() == [
            arch_cost(arch, weight_bytes) for arch in archs
        ]
        assert codec.features(codec.known)[:, -1].tolist() == [loss(arch) for arch in archs]


class TestArms:
    @pytest.mark.parametrize("name", list(ARMS))
    def test_every_arm_evaluates_as_many_different_archs(self, arms: Arms, name: str) -> None:
        points = ARMS[name](arms, 0, 14)
        assert len({point.arch.id for point in points}) == len(points) == 14
        prices = Prices(arms.space, arms.table, arms.workload)
        for point in points:
            row = arms.space.encode(point.arch)[None]
            costs = [float(prices.of(metric, row)[0]) for metric in OBJECTIVES[1:]]
            assert point.values == pytest.approx((loss(point.arch), *costs))

    def test_two_steps_round_the_front_of_the_first(self, arms: Arms) -> None:
        points = arms.two_steps(0, 16)
        first, second = points[:8], points[8:]
        assert all(bits_of(point.arch) == {"fp32"} for point in first)
        on_front = non_dominated([point.values for point in first])
        settled = [without_bits(p.arch) for p, on in zip(first, on_front, strict=True) if on]
        assert all(without_bits(point.arch) in settled for point in second)
        assert all("int8" in bits_of(point.arch) for point in second)

    def test_bits_only_keeps_the_largest_arch(self, arms: Arms) -> None:
        points = arms.bits_only(0, 10)
        largest = without_bits(arms.space.largest())
        assert points[0].arch == arms.space.largest()
        assert all(without_bits(point.arch) == largest for point in points)

    def test_joint_mixes_bits(self, arms: Arms) -> None:
        assert any(len(bits_of(point.arch)) == 2 for point in arms.joint(0, 14))

    def test_a_space_that_is_used_up_ends_the_search(self, arms: Arms) -> None:
        space = arms.space.restricted(
            d_model=[32], skip=[False], mixer=["softmax"], heads=["2x1"], position=["rope"],
            ffn=["relu2"], intermediate_size=[64], norm=["layernorm"], ffn_precision=["fp32"],
        )  # fmt: skip
        few = Arms(space, arms.table, arms.workload, OBJECTIVES, loss)
        assert len(few.joint(0, 12)) == space.size() == 8


def test_a_loss_is_computed_once_and_kept_with_what_it_depends_on(
    space: SearchSpace, tmp_path: Path
) -> None:
    asked: list[str] = []

    def evaluate(arch: Arch) -> float:
        asked.append(arch.id)
        return loss(arch)

    path = tmp_path / "losses.json"
    for stamp, calls in (({"steps": 1}, 1), ({"steps": 1}, 1), ({"steps": 2}, 2)):
        losses = Losses(evaluate, path, stamp)
        assert losses(space.largest()) == losses(space.largest()) == loss(space.largest())
        losses.save()
        assert len(asked) == calls


def test_arms_are_compared_on_one_scale(space: SearchSpace) -> None:
    arch = space.largest()

    def run(*values: tuple[float, float]) -> list[Point]:
        return [Point(arch, value) for value in values]

    found = {
        "joint": [run((1.0, 2.0), (2.0, 1.0)), run((2.0, 1.0), (1.0, 2.0))],
        "architecture, then bits": [run((2.0, 2.0), (1.0, 2.0)), run((9.0, 9.0), (2.0, 1.0))],
        "bits only": [run((1.0, 2.0), (3.0, 3.0)), run((3.0, 3.0), (3.0, 3.0))],
    }
    result = joint_bits.compare(found)
    joint, steps, bits = result["arms"]
    # Each corner of the front covers 1.1 x 0.1 of the whole 2 x 0.11 - 0.01.
    corner = 0.11 / 0.21
    assert joint["hv"] == pytest.approx({"median": 1.0, "min": 1.0, "max": 1.0})
    assert steps["hv"] == pytest.approx({"median": corner, "min": corner, "max": corner})
    assert bits["hv"] == pytest.approx({"median": corner, "min": 0.0, "max": corner})
    assert joint["joint needs"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert steps["joint needs"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert result["joint_wins"] == {"joint": 0, "architecture, then bits": 2, "bits only": 2}


def test_the_table_and_the_plot_show_every_arm(
    arms: Arms, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {name: [arm(arms, 0, 10)] for name, arm in ARMS.items()}
    joint_bits.print_table(joint_bits.compare(found)["arms"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARMS) and "hv10" in printed
    joint_bits.plot(found, OBJECTIVES, tmp_path / "joint.png")
    assert (tmp_path / "joint_3.png").stat().st_size > 10_000


def test_several_metrics_at_once_are_those_one_by_one(
    space: SearchSpace, table: LatencyTable
) -> None:
    prices = Prices(space, table, "decode_b1_t64")
    rows = space.sample_genotypes(np.random.default_rng(2), 300)
    for metrics in ((), ("params",), ("latency_ms", "weight_bytes", "prefill_ms")):
        together = prices.of_all(metrics, rows)
        assert together.shape == (300, len(metrics))
        for column, metric in enumerate(metrics):
            assert (together[:, column] == prices.of(metric, rows)).all()
    assert prices.of_all(("params",), rows[:0]).shape == (0, 1)


def test_constraints_are_shares_of_their_limits(space: SearchSpace, table: LatencyTable) -> None:
    prices = Prices(space, table, "prefill_b1_t64")
    objectives = Objectives.parse(OBJECTIVES, ["latency_ms<=0.2", "params<=5e4"], prices.metrics)
    rows = space.sample_genotypes(np.random.default_rng(3), 50)
    expected = np.stack(
        [prices.of("latency_ms", rows) / 0.2 - 1, prices.of("params", rows) / 5e4 - 1], axis=1
    )
    constraints = SpaceCodec(space, prices, objectives).constraints(rows)
    assert constraints == pytest.approx(expected)


class TestLazyFeatures:
    @pytest.fixture(params=["genes", "genes and more"])
    def lazy(self, space: SearchSpace, request: pytest.FixtureRequest) -> LazyFeatures:
        rows = space.sample_genotypes(np.random.default_rng(4), 2500)
        extra: Callable[[Any], Any] | None = None
        if request.param != "genes":
            extra = lambda levels: np.stack([levels.sum(axis=1), levels[:, 0] ** 2.0], axis=1)  # noqa: E731
        return LazyFeatures(GeneEncoding(genes_of(space), extra, rows[:100]), rows)

    def test_products_are_those_of_the_features(self, lazy: LazyFeatures) -> None:
        features = lazy.encoding.encode(lazy.levels)
        weights = np.random.default_rng(5).standard_normal((features.shape[1], 3))
        expected = features.astype(np.float64) @ weights
        error = np.sqrt(np.mean((lazy @ weights - expected) ** 2) / np.mean(expected**2))
        assert error < 1e-6
        assert np.asarray(lazy[7:9]) == pytest.approx(features[7:9], abs=1e-6)
        assert (lazy.shape, len(lazy), lazy.dtype) == (features.shape, 2500, features.dtype)

    @pytest.mark.parametrize("rugged", [False, True])
    def test_a_ridge_predicts_the_same(self, lazy: LazyFeatures, rugged: bool) -> None:
        features = lazy.encoding.encode(lazy.levels)
        rng = np.random.default_rng(6)
        few = [c for c, group in enumerate(lazy.encoding.groups) if group == "total"][:2]
        labels = features @ (rng.standard_normal(features.shape[1]) * 0.1)
        prior = lazy.encoding.prior_scale
        if rugged:
            # Few columns that count, and nothing linear about them: what the RBF term is for.
            labels = np.sin(4.0 * features[:, few]).sum(axis=1)
            prior = np.full(len(prior), 1e-3)
            prior[few] = 1.0
        model = PriorRidge(prior).fit(features[:150], labels[:150])
        assert (model.state()["rbf"] is not None) == rugged
        # Angles of the random features are products in fp32, summed in another order.
        bound = 1e-5 if rugged else 2e-6
        plain, fast = model.predict_mean(features), model.predict_mean(lazy)
        assert np.abs(plain - fast).max() < bound * np.abs(plain).max()
        draws = model.draw(rng, 3)
        plain, fast = model.predict_draws(features, draws), model.predict_draws(lazy, draws)
        assert fast.shape == (2500, 4)
        assert np.abs(plain - fast).max() < bound * np.abs(plain).max()


def test_scores_of_many_candidates_are_those_of_each() -> None:
    problem = million_candidates.made_up("decoder-tiny", 80)
    rows = million_candidates.draw(problem.space, 3000, 0)
    assert (problem.space.canonical(rows) == rows).all()
    seconds, values = million_candidates.score(problem, rows, 2)
    assert all(value >= 0 for value in seconds.values()) and "all, wall s" in seconds
    encoding, model = million_candidates.fitted(problem, rows[:768])
    archs = [problem.space.decode(row) for row in rows[:40]]
    assert values[:40, 2].tolist() == [arch_cost(arch, weight_bytes) for arch in archs]
    assert values[:40, 1] == pytest.approx(problem.prices.of("latency_ms", rows[:40]))
    assert values[:, 0] == pytest.approx(model.predict(encoding.encode(rows))[0], rel=1e-6)
    assert np.corrcoef(values[:, 0], np.log(problem.prices.of("params", rows)))[0, 1] < -0.95
