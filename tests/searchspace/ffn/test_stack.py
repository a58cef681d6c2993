"""Feed-forward stacks: the formula, and options of FFNs as genes of a space."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from searchspace.arch import Arch, LayerArch
from searchspace.cost import arch_cost, num_params
from searchspace.errors import UserError
from searchspace.ffn import FFNS
from searchspace.ffn.stack import GeluStack
from searchspace.importance import order_by_importance
from searchspace.mixers import MIXERS
from searchspace.space import SearchSpace
from searchspace.specs import FFNSpec
from searchspace.supernet import Supernet
from searchspace.testing import sharing_checks

D_MODEL, WIDTH, INNER = 6, 10, 7
SPACE = SearchSpace(
    name="stacks",
    vocab_size=11,
    d_model=(16, 8),
    head_dim=4,
    num_layers=2,
    mixers={"softmax": {}},
    heads=((2, 2),),
    intermediate_size=(24, 9),
    ffn=("gelu_stack", "relu2"),
    ffn_options={"gelu_stack": {"num_inner": (2, 1, 0), "inner_size": (12, 5)}},
)


def gelu(x: float) -> float:
    return x / 2 * (1 + math.erf(x / math.sqrt(2)))


def by_loops(ffn: GeluStack, x: Tensor) -> Tensor:
    rows = []
    for token in x.flatten(0, 1):
        hidden = token
        last = ffn.inner_down_proj if len(ffn.inner) else ffn.down_proj
        for linear in (ffn.up_proj, *ffn.inner):
            sums = [
                sum(float(w * h) for w, h in zip(r, hidden, strict=True)) for r in linear.weight
            ]
            hidden = torch.tensor([gelu(total) for total in sums], dtype=torch.float64)
        rows.append(last.weight @ hidden)
    return torch.stack(rows).view_as(x)


@torch.no_grad()
@pytest.mark.parametrize("num_inner", [0, 1, 2])
def test_stack_against_loops(num_inner: int) -> None:
    options = (("inner_size", INNER), ("num_inner", num_inner))
    ffn = GeluStack(FFNSpec(D_MODEL, "gelu_stack", WIDTH, options=options)).double()
    ffn.reset(torch.Generator().manual_seed(0), 1)
    x = torch.randn(2, 3, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ffn(x), by_loops(ffn, x))
    widths = [D_MODEL, WIDTH, *[INNER] * num_inner, D_MODEL]
    expected = sum(a * b for a, b in itertools.pairwise(widths))
    assert sum(p.numel() for p in ffn.parameters()) == expected


class TestOptions:
    def test_a_width_without_maps_does_not_count(self) -> None:
        plain = LayerArch(ffn="gelu_stack", intermediate_size=8)
        assert replace(plain, ffn_options={"num_inner": 0, "inner_size": 99}) == plain
        assert plain.ffn_options == () and plain.all_ffn_options["num_inner"] == 0
        assert "ffn_options" not in plain.to_dict()

    def test_round_trip_and_key(self) -> None:
        layer = LayerArch(
            ffn="gelu_stack", intermediate_size=8, ffn_options={"num_inner": 2, "inner_size": 4}
        )
        arch = Arch(8, 4, 11, (layer,))
        assert Arch.from_json(arch.to_json()) == arch
        assert layer.to_dict()["ffn_options"] == {"inner_size": 4, "num_inner": 2}
        key = "ffn/gelu_stack_inner_size4_num_inner2/d8/f8/rmsnorm/fp32"
        assert arch.sub_blocks()[0].key == key
        other = replace(layer, ffn_options={"num_inner": 1, "inner_size": 4})
        assert Arch(8, 4, 11, (other,)).id != arch.id

    def test_options_of_what_is_absent_are_dropped(self) -> None:
        layer = LayerArch("softmax", 2, 2, ffn="gelu_stack", ffn_options={"num_inner": 2})
        assert layer.ffn == "none" and layer.ffn_options == ()

    @pytest.mark.parametrize(
        ("ffn", "options", "sentence"),
        [
            ("gelu", {"num_inner": 1}, "unknown option of ffn 'gelu' 'num_inner'"),
            ("gelu_stack", {"inner": 1}, "unknown option of ffn 'gelu_stack' 'inner'"),
            (
                "gelu_stack",
                {"num_inner": 3},
                "unknown gelu_stack.num_inner 3",
            ),
            (
                "gelu_stack",
                {"num_inner": 1, "inner_size": 0},
                "gelu_stack.inner_size=0 must be a whole number of at least 1",
            ),
            ("gelu_stack", 7, "ffn_options=7 is no mapping of options"),
        ],
    )
    def test_mistakes(self, ffn: str, options: object, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            LayerArch(ffn=ffn, intermediate_size=8, ffn_options=options)  # type: ignore[arg-type]

    def test_no_mixer_and_ffn_have_the_same_name(self) -> None:
        # Genes of options are named after either.
        assert not set(MIXERS) & set(FFNS)


class TestSpace:
    def test_genes(self) -> None:
        assert SPACE.genes["layers.0.gelu_stack.num_inner"] == (2, 1, 0)
        assert SPACE.genes["layers.1.gelu_stack.inner_size"] == (12, 5)
        chosen = SPACE.uniform(ffn="gelu_stack", **{"gelu_stack.num_inner": 1})
        options = {"bias": "none", "num_inner": 1, "inner_size": 12}
        assert chosen.layers[0].all_ffn_options == options
        plain = SPACE.uniform(ffn="relu2", **{"gelu_stack.num_inner": 1})
        assert plain == SPACE.uniform(ffn="relu2")

    def test_toml_tables(self, tmp_path: Path) -> None:
        text = """
        d_model = [16]
        head_dim = 4
        num_layers = 2
        [layers]
        heads = [[2, 2]]
        intermediate_size = [24]
        [layers.ffn.relu2]
        [layers.ffn.gelu_stack]
        num_inner = [2, 0]
        [layers.mixer.softmax]
        """
        path = tmp_path / "tables.toml"
        path.write_text(text)
        space = SearchSpace.load(str(path), 11)
        assert space.ffn == ("relu2", "gelu_stack")
        assert space.ffn_options == {"gelu_stack": {"num_inner": (2, 0)}}
        assert SearchSpace.from_dict(space.to_dict(), 11) == space
        assert SearchSpace.from_dict(SPACE.to_dict(), 11) == SPACE

    def test_a_list_of_names_still_does(self) -> None:
        values = SPACE.to_dict()
        values["layers"]["ffn"] = ["relu2", "gelu"]
        space = SearchSpace.from_dict(values, 11)
        assert space.ffn == ("relu2", "gelu") and space.ffn_options == {}
        assert space.to_dict()["layers"]["ffn"] == ["relu2", "gelu"]

    @pytest.mark.parametrize(
        ("ffn", "sentence"),
        [
            ({"gelu_stack": {"num_iner": [1]}}, "option of ffn 'gelu_stack' 'num_iner': did you"),
            ({"gelu_stack": {"num_inner": 1}}, r"gelu_stack.num_inner=1 must be a list"),
            ({"gelu_stack": {"num_inner": []}}, "gelu_stack.num_inner has no choices"),
            ({"gelu_stack": 3}, "ffn must be a table with one table per ffn"),
            ({"relu2": {"num_inner": [1]}}, "unknown option of ffn 'relu2' 'num_inner'"),
        ],
    )
    def test_mistakes(self, ffn: object, sentence: str) -> None:
        values = SPACE.to_dict()
        values["layers"]["ffn"] = ffn
        with pytest.raises(UserError, match=sentence):
            SearchSpace.from_dict(values, 11)

    def test_options_of_an_ffn_that_is_not_offered(self) -> None:
        with pytest.raises(UserError, match="with ffn_options 'geglu'"):
            replace(SPACE, ffn_options={"geglu": {}})

    def test_what_is_not_offered_is_named(self) -> None:
        arch = SPACE.largest()
        layer = replace(arch.layers[0], ffn_options={"num_inner": 2, "inner_size": 3})
        with pytest.raises(UserError, match=r"layers.0.gelu_stack.inner_size=3 is not in space"):
            SPACE.encode(replace(arch, layers=(layer, arch.layers[1])))
        layer = replace(arch.layers[0], ffn="gelu", ffn_options=())
        with pytest.raises(UserError, match=r"layers.0.ffn='gelu' is not in space"):
            SPACE.encode(replace(arch, layers=(layer, arch.layers[1])))
        layer = replace(arch.layers[0], intermediate_size=0)
        with pytest.raises(UserError, match=r"layers.0.intermediate_size=0 is not in space"):
            SPACE.encode(replace(arch, layers=(layer, arch.layers[1])))

    def test_one_change_reaches_every_option(self) -> None:
        layers = {arch.layers[0] for arch in SPACE.one_change_from_largest()}
        options = [layer.all_ffn_options for layer in layers if layer.ffn == "gelu_stack"]
        found = {(option["num_inner"], option["inner_size"]) for option in options}
        assert {(0, 512), (2, 5)} <= found


@torch.no_grad()
def test_every_choice_runs_on_shared_weights() -> None:
    supernet = Supernet(SPACE, torch.Generator().manual_seed(0))
    assert supernet.params["blocks.layer0_ffn.op.inner.0.weight"].shape == (12, 24)
    assert supernet.params["blocks.layer0_ffn.op.inner_down_proj.weight"].shape == (16, 12)
    tokens = torch.arange(14).reshape(2, 7) % 11
    rows = SPACE.sample_genotypes(np.random.default_rng(0), 40)
    for row in rows:
        arch = SPACE.decode(row)
        difference = supernet.view(arch)(tokens) - supernet.extract(arch)(tokens)
        assert difference.abs().max() <= 1e-5
        assert sum(p.numel() for p in supernet.extract(arch).parameters()) == arch_cost(
            arch, num_params
        )


def test_importance_ordering_keeps_the_largest_network() -> None:
    supernet = Supernet(SPACE, torch.Generator().manual_seed(0))
    tokens = torch.arange(14).reshape(2, 7) % 11
    before = supernet.view(SPACE.largest())(tokens)
    up_before = supernet.params["blocks.layer0_ffn.op.up_proj.weight"].clone()
    order_by_importance(supernet, [(tokens, tokens)], lambda logits, _: logits.square().sum())
    torch.testing.assert_close(supernet.view(SPACE.largest())(tokens), before)
    assert not torch.equal(up_before, supernet.params["blocks.layer0_ffn.op.up_proj.weight"])


def test_a_stack_that_is_laid_out_the_other_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FFNSpec(24, "gelu_stack", 17, options=(("inner_size", 12), ("num_inner", 2)))
    sharing_checks.check_nested(spec)

    def flipped(self: GeluStack, x_BTD: Tensor, state: object = None) -> Tensor:
        hidden = self.activation(self.up_proj(x_BTD))
        hidden = self.activation(self.inner[0](hidden))
        hidden = self.activation(self.inner[1](hidden))
        return self.inner_down_proj(hidden.flip(-1))

    monkeypatch.setattr(GeluStack, "forward", flipped)
    with pytest.raises(AssertionError, match="is laid out so that a smaller network"):
        sharing_checks.check_nested(spec)
