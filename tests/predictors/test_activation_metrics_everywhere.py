"""Activation metrics on every operator, family and precision, and where there is little to see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from predictors.zero_cost import METRICS, Probe
from predictors.zero_cost.forward_pass import forward_pass, there
from searchspace.arch import LayerArch
from searchspace.errors import UserError
from searchspace.family import DECODER, Family
from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.norms import PRepBN
from searchspace.precisions import PRECISIONS
from searchspace.specs import PLACEMENTS
from tests.predictors.test_activation_metrics import (
    CLASS_TOKEN,
    ENCODER,
    LAYER,
    PAD,
    VIT,
    batch_for,
    make_arch,
    make_probe,
)

NAMES = (
    "activation_distance",
    "head_confidence",
    "softmax_confidence",
    "hidden_covariance",
    "v_pca",
    "w_pca",
    "zen",
    "signal_propagation",
    "block_linearity",
)
SOFTMAXES = {
    "softmax", "sliding_window", "strided", "fixed", "dilated", "diag_block", "linformer",
}  # fmt: skip
SEED = 5


class TestAttention:
    @pytest.mark.parametrize("family", [DECODER, ENCODER], ids=["decoder", "encoder"])
    def test_there_exactly_where_weights_are_a_softmax_over_keys(self, family: Family) -> None:
        direction = "causal" if family.causal else "bidirectional"
        found = set()
        for name, mixer in MIXERS.items():
            if direction in mixer.directions:
                probe = make_probe(make_arch(replace(LAYER, mixer=name), family=family))
                if probe.forward_pass.attention:
                    found.add(name)
        assert found == {n for n in SOFTMAXES if direction in MIXERS[n].directions}

    def test_long_batches_are_looked_at_in_part(self) -> None:
        probe = make_probe(make_arch(LAYER), torch.float32, sequences=3, tokens=300)
        whole = forward_pass(probe.network, probe.inputs[:, :256]).attention
        assert probe.forward_pass.attention == pytest.approx(whole)
        assert len(probe.forward_pass.streams["layer0_ffn"]) == 450


class TestPadding:
    @pytest.mark.parametrize("family", [ENCODER, CLASS_TOKEN], ids=["mean", "class_token"])
    def test_more_of_it_changes_nothing(self, family: Family) -> None:
        # Each token on its own, so that padding is seen by nothing else.
        layers = [replace(LAYER, mixer="glu_mixer", ffn=f) for f in ("gelu", "swiglu")]
        arch = make_arch(*layers, family=family)
        inputs, classes = batch_for(arch)
        longer = torch.cat([inputs, torch.full((4, 6), PAD)], dim=1)
        empty = torch.full((1, 17), PAD)
        longer, more = torch.cat([longer, empty]), torch.cat([classes, classes[:1]])
        probes = [
            Probe(arch, batch, SEED, torch.float64) for batch in ((inputs, classes), (longer, more))
        ]
        for name in NAMES:
            if name not in ("zen", "hidden_covariance"):
                short, long = (METRICS[name](p) for p in probes)
                assert long == pytest.approx(short, rel=1e-9), name

    def test_class_token_is_there(self) -> None:
        found = there(torch.tensor([[3, PAD], [PAD, PAD]]), CLASS_TOKEN)
        assert found.tolist() == [[True, True, False], [False, False, False]]

    def test_nothing_else_is_refused(self) -> None:
        arch = make_arch(LAYER, family=ENCODER)
        probe = Probe(arch, (torch.zeros(2, 4).long(), torch.arange(2)), SEED)
        with pytest.raises(UserError, match="every token of the batch is padding"):
            METRICS["head_confidence"](probe)


class TestEveryMetric:
    @pytest.mark.parametrize("operator", [*MIXERS, *FFNS])
    def test_single_precision_agrees_with_double(self, operator: str) -> None:
        change = {"mixer" if operator in MIXERS else "ffn": operator}
        for norm, family in (("layernorm", DECODER), ("prepbn", ENCODER), ("unified_norm", VIT)):
            layer = replace(LAYER, norm=norm, **change)
            if family.causal and "causal" not in MIXERS[layer.mixer].directions:
                continue
            arch = make_arch(layer, layer, family=family)
            low, high = make_probe(arch, torch.float32), make_probe(arch)
            for name in NAMES:
                # A logarithm near 0 has no relative error to speak of; a sign may fall either way.
                expected = pytest.approx(METRICS[name](high), rel=1e-3, abs=1e-4)
                assert METRICS[name](low) == expected, (name, norm)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_precisions(self, precision: str) -> None:
        layer = replace(LAYER, mixer_precision=precision, ffn_precision=precision, ffn="swiglu")
        rounded, exact = make_probe(make_arch(layer, layer)), make_probe(make_arch(LAYER, LAYER))
        for name in ("head_confidence", "v_pca", "signal_propagation"):
            assert METRICS[name](rounded) > -1.0
        assert METRICS["head_confidence"](rounded) == pytest.approx(
            METRICS["head_confidence"](exact), rel=0.5
        )

    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_placements_of_norms(self, placement: str) -> None:
        layer = replace(LAYER, norm_placement=placement)
        probe = make_probe(make_arch(layer, layer))
        for name in NAMES:
            assert math.isfinite(METRICS[name](probe)), name
        if placement == "post":
            # Post-norm brings every token back to unit size.
            streams = probe.forward_pass.streams.values()
            embedded, *later = [float(rows.square().mean()) for rows in streams]
            assert later == pytest.approx([1.0] * 4, rel=1e-4)
            assert METRICS["signal_propagation"](probe) == pytest.approx(
                -abs(math.log(embedded)) / 5, rel=1e-3
            )

    def test_sums_grow_with_depth_and_the_rest_stays_bounded(self) -> None:
        shallow, deep = (
            make_probe(make_arch(*[LAYER] * depth), torch.float32) for depth in (2, 40)
        )
        for name in NAMES:
            assert math.isfinite(METRICS[name](deep)), name
        for name in ("activation_distance", "head_confidence", "softmax_confidence", "v_pca"):
            ratio = METRICS[name](deep) / METRICS[name](shallow)
            assert ratio == pytest.approx(20, rel=0.3), name

    def test_nothing_to_look_at_is_the_least_value(self) -> None:
        probe = make_probe(make_arch(LayerArch()))
        values = {name: METRICS[name](probe) for name in NAMES}
        for name in (*NAMES[:3], "v_pca", "w_pca"):
            assert values[name] == 0.0
        assert values["block_linearity"] == 0.0
        assert values["zen"] == pytest.approx(math.log(0.01 * math.sqrt(2 / math.pi)), abs=0.2)
        fourier = make_probe(make_arch(replace(LAYER, mixer="fourier"), family=ENCODER))
        assert METRICS["head_confidence"](fourier) == METRICS["softmax_confidence"](fourier) == 0.0

    def test_one_pass_serves_all_and_hooks_are_gone(self) -> None:
        probe = make_probe(make_arch(LAYER))
        calls: list[int] = []
        probe.network.blocks["layer0_ffn"].register_forward_hook(lambda *_: calls.append(1))
        for name in NAMES:
            if name != "zen":
                METRICS[name](probe)
        assert len(calls) == 1
        for module in probe.network.blocks["layer0_mixer"].modules():
            assert not module._forward_hooks and not module._forward_pre_hooks

    def test_statistics_of_norms_do_not_matter_twice(self) -> None:
        layer = replace(LAYER, norm="prepbn")
        probe = make_probe(make_arch(layer))
        assert all(m.blend == 1.0 for m in probe.network.modules() if isinstance(m, PRepBN))
        first, second = (forward_pass(probe.network, probe.inputs) for _ in range(2))
        assert torch.equal(first.streams["layer0_ffn"], second.streams["layer0_ffn"])


class TestDegenerate:
    @pytest.mark.parametrize("name", NAMES)
    def test_one_token(self, name: str) -> None:
        probe = make_probe(make_arch(LAYER), sequences=1, tokens=1)
        sentence = {
            "hidden_covariance": "give at least two", "block_linearity": "give at least 3",
        }.get(name)  # fmt: skip
        if sentence is not None:
            with pytest.raises(UserError, match=sentence):
                METRICS[name](probe)
        else:
            assert math.isfinite(METRICS[name](probe))

    @pytest.mark.parametrize("name", NAMES)
    def test_equal_tokens_everywhere(self, name: str) -> None:
        arch = make_arch(replace(LAYER, position="nope"))
        batch = torch.full((3, 6), 2)
        probe = Probe(arch, (batch, batch), SEED)
        if name == "block_linearity":
            with pytest.raises(UserError, match="is the same for all tokens"):
                METRICS[name](probe)
            return
        value = METRICS[name](probe)
        assert math.isfinite(value)
        if name in ("v_pca", "w_pca"):
            assert value == 0.0

    def test_a_mixer_that_says_nothing(self) -> None:
        # The normalised score of a single key is 0.
        probe = make_probe(make_arch(replace(LAYER, mixer="norm_attention")), tokens=1)
        with pytest.raises(UserError, match="output of layer0_mixer is the same throughout"):
            METRICS["hidden_covariance"](probe)

    def test_a_stream_that_is_not_finite(self) -> None:
        probe = make_probe(make_arch(LAYER))
        with torch.no_grad():
            probe.network.blocks["layer0_ffn"].op.down_proj.weight[0, 0] = math.inf
        with pytest.raises(UserError, match="stream after layer0_ffn is not finite"):
            METRICS["signal_propagation"](probe)
        with pytest.raises(UserError, match="features of standard normal weights"):
            METRICS["zen"](probe)
