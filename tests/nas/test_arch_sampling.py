"""Which archs a step trains."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nas.arch_sampling import ARCH_SAMPLINGS, ArchSampler
from searchspace.cost import arch_cost, num_params
from searchspace.errors import UserError
from searchspace.space import SearchSpace


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.load("decoder-tiny", 64)


@pytest.mark.parametrize("name", ARCH_SAMPLINGS)
def test_archs_follow_from_seed_and_step_alone(space: SearchSpace, name: str) -> None:
    sampler = ArchSampler(name, space, 2, seed=1)
    late = sampler.archs(5)
    again = ArchSampler(name, space, 2, seed=1)
    assert [again.archs(step) for step in range(6)][5] == late
    other = ArchSampler(name, space, 2, seed=2).archs(5)
    assert (other == late) == (name == "matformer")  # the only one that draws nothing
    for item in late:
        space.encode(item.arch)


def test_sandwich_and_uniform(space: SearchSpace) -> None:
    archs = ArchSampler("sandwich", space, 3, seed=0).archs(0)
    assert [a.role for a in archs] == ["largest", "smallest", "random", "random", "random"]
    assert archs[0].arch == space.largest() and archs[1].arch == space.smallest()
    assert len(ArchSampler("sandwich", space, 0, seed=0).archs(0)) == 2
    uniform = ArchSampler("uniform", space, 3, seed=0).archs(0)
    assert uniform == archs[2:]


def test_fair_uses_every_mixer_equally_often(space: SearchSpace) -> None:
    mixers = list(space.mixers)
    archs = ArchSampler("fair", space, 2 * len(mixers), seed=0).archs(0)
    assert {a.role for a in archs} == {"random"}
    for slot in range(space.num_layers):
        used = Counter(a.arch.layers[slot].mixer for a in archs if not a.arch.layers[slot].skip)
        assert set(used) <= set(mixers)
        assert max(used[name] for name in mixers if name != "none") <= 2


def test_matformer_trains_every_width_of_the_same_layers(space: SearchSpace) -> None:
    archs = ArchSampler("matformer", space, 1, seed=0).archs(0)
    assert [a.role for a in archs] == ["largest", "ffn_64", "ffn_0"]
    assert archs[0].arch == space.largest()
    assert sum(a.weight for a in archs) == pytest.approx(1.0)
    for item, width in zip(archs, (128, 64, 0), strict=True):
        assert {layer.intermediate_size for layer in item.arch.layers} == {width}
        assert {layer.mixer for layer in item.arch.layers} == {"softmax"}


def test_by_size_spreads_parameter_counts_evenly(space: SearchSpace) -> None:
    low, high = (arch_cost(a, num_params) for a in (space.smallest(), space.largest()))

    def entropy_of_tenths(name: str) -> float:
        sampler = ArchSampler(name, space, 4, seed=0)
        sizes = [arch_cost(a.arch, num_params) for step in range(60) for a in sampler.archs(step)]
        shares = np.histogram((np.array(sizes) - low) / (high - low), 10, (0, 1))[0] / len(sizes)
        return float(-(shares * np.log(np.maximum(shares, 1e-9))).sum())

    assert entropy_of_tenths("by_size") > 0.97 * np.log(10)
    assert entropy_of_tenths("uniform") < 0.9 * np.log(10)


def test_wrong_requests_are_refused(space: SearchSpace) -> None:
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        ArchSampler("unifrom", space, 1, seed=0)
    for name in ("uniform", "by_size"):
        with pytest.raises(UserError, match=f"'{name}' trains random archs only"):
            ArchSampler(name, space, 0, seed=0)
