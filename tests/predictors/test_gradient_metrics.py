"""The gradient-based metrics against slow references: masks, loops and finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.dispatch import triton_available
from predictors.zero_cost import FAN_IN, INITS, METRICS, Probe, score_archs
from predictors.zero_cost import _twice as twice
from predictors.zero_cost._stateless import FirstBatchNorm
from predictors.zero_cost.inits import NORMAL_STD
from predictors.zero_cost.loss_pass import linear_weights
from predictors.zero_cost.nuclear import nuclear_norm
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.ffn import FFNS
from searchspace.linear import Linear
from searchspace.mixers import MIXERS
from searchspace.norms.unified_norm import UnifiedNorm
from searchspace.sub_blocks import MixerBlock
from tests.predictors.test_zero_cost import (
    ENCODER,
    LAYER,
    SEED,
    VIT,
    batch_for,
    make_arch,
    make_batch,
)

SUMS = ("synaptic_diversity", "synaptic_saliency", "head_importance")
NAMES = ("plain", "grasp", "fisher", *SUMS, "dss", "jacobian_cosine")


def exact(arch: Arch) -> Probe:
    return Probe(arch, batch_for(arch), SEED, torch.float64)


def loss_of(probe: Probe) -> Tensor:
    logits = probe.network(probe.inputs)
    return F.cross_entropy(logits.flatten(0, -2), probe.targets.flatten())


def gradients_of(probe: Probe) -> dict[str, Tensor]:
    weights = linear_weights(probe.network)
    grads = torch.autograd.grad(loss_of(probe), list(weights.values()), materialize_grads=True)
    return dict(zip(weights, grads, strict=True))


@pytest.fixture(scope="module")
def networks() -> Iterator[list[Probe]]:
    """A decoder with gates and a skipped slot, an encoder with padding, a ViT with its token."""
    gla = replace(LAYER, mixer="gla", ffn="swiglu", norm="layernorm")
    mamba = replace(LAYER, mixer="mamba", ffn="rwkv_channelmix", norm="unified_norm")
    yield [
        exact(make_arch(LAYER, LayerArch(), gla)),
        exact(make_arch(mamba, LAYER, family=ENCODER)),
        exact(make_arch(LAYER, family=VIT)),
    ]


class TestEveryMetric:
    @pytest.mark.parametrize("operator", [*MIXERS, *FFNS])
    def test_fp32_agrees_with_fp64(self, operator: str) -> None:
        change = {"mixer" if operator in MIXERS else "ffn": operator}
        for norm, family in (("layernorm", None), ("prepbn", ENCODER), ("unified_norm", VIT)):
            arch = make_arch(replace(LAYER, norm=norm, **change), family=family)
            low, high = Probe(arch, batch_for(arch), SEED), exact(arch)
            for name in NAMES:
                assert METRICS[name](low) == pytest.approx(METRICS[name](high), rel=1e-2), name

    @pytest.mark.parametrize("placement", ["post", "peri"])
    def test_fp32_agrees_with_fp64_for_other_placements(self, placement: str) -> None:
        layer = replace(LAYER, norm_placement=placement)
        arch = make_arch(layer, layer)
        low, high = Probe(arch, batch_for(arch), SEED), exact(arch)
        for name in NAMES:
            assert METRICS[name](low) == pytest.approx(METRICS[name](high), rel=1e-2), name

    def test_factorised_embedding_and_layers_that_end_in_a_norm(self) -> None:
        family = replace(
            ENCODER, embedding_size=8, embedding_norm="unified_norm", final_norm="none"
        )
        arch = make_arch(replace(LAYER, norm_placement="post"), family=family)
        low, high = Probe(arch, batch_for(arch), SEED), exact(arch)
        for name in NAMES:
            assert METRICS[name](low) == pytest.approx(METRICS[name](high), rel=1e-2), name

    @pytest.mark.parametrize("norm", ["layernorm", "prepbn", "unified_norm"])
    def test_order_of_metrics_does_not_matter(self, norm: str) -> None:
        layer = replace(LAYER, norm=norm)
        arch = make_arch(layer, layer, family=ENCODER)
        one, other = (Probe(arch, batch_for(arch), SEED) for _ in range(2))
        names = [name for name in METRICS if name != "flops"]
        forward = {name: METRICS[name](one) for name in names}
        backward = {name: METRICS[name](other) for name in reversed(names)}
        assert forward == backward

    def test_low_precisions_pass_gradients_straight_through(self) -> None:
        for precision in ("int8", "int4", "ternary", "bf16"):
            layer = replace(LAYER, mixer_precision=precision, ffn_precision=precision)
            probe = Probe(make_arch(layer), make_batch(), SEED)
            grads = gradients_of(probe)
            assert all(bool(grad.any()) for grad in grads.values()), precision
            assert all(math.isfinite(METRICS[name](probe)) for name in NAMES), precision

    def test_nothing_to_look_at_is_zero(self) -> None:
        no_layer = make_arch(LayerArch())
        no_linears = make_arch(replace(LAYER, mixer="pool", ffn="none", intermediate_size=0))
        for arch in (no_layer, no_linears):
            assert [METRICS[name](exact(arch)) for name in SUMS] == [0.0, 0.0, 0.0]
        averaged = replace(LAYER, mixer_options=(("vo", "identity"),))
        assert METRICS["head_importance"](exact(make_arch(averaged))) == 0.0
        assert METRICS["synaptic_diversity"](exact(make_arch(averaged))) > 0.0

    @pytest.mark.parametrize("name", ["plain", "grasp", "fisher", "synaptic_diversity"])
    def test_a_constant_loss_is_refused(self, name: str) -> None:
        arch = replace(make_arch(LAYER), vocab_size=1)
        with pytest.raises(UserError, match="gradient vanishes"):
            METRICS[name](Probe(arch, make_batch(vocab=1), SEED))


class TestDefinitions:
    def test_plain_is_the_slope_by_a_common_factor(self, networks: list[Probe]) -> None:
        for probe in networks:
            weights, step = linear_weights(probe.network), 1e-6
            losses = []
            with torch.no_grad():
                for factor in (1 + step, (1 - step) / (1 + step)):
                    for weight in weights.values():
                        weight *= factor
                    losses.append(loss_of(probe).item())
                for weight in weights.values():
                    weight /= 1 - step
            slope = (losses[0] - losses[1]) / (2 * step)
            assert METRICS["plain"](probe) == pytest.approx(slope, rel=1e-5, abs=1e-8)

    def test_synaptic_sums_by_hand(self, networks: list[Probe]) -> None:
        for probe in networks:
            diversity, saliency = 0.0, 0.0
            grads = gradients_of(probe)
            for name, weight in linear_weights(probe.network).items():
                w, g = weight.detach().numpy(), grads[name].numpy()
                if "_mixer.op." in name:
                    diversity += np.linalg.norm(w, "nuc") * np.linalg.norm(g, "nuc")
                elif "_ffn.op." in name:
                    saliency += np.abs(w * g).sum()
            assert diversity > 0 and saliency > 0
            assert METRICS["synaptic_diversity"](probe) == pytest.approx(diversity, rel=1e-6)
            assert METRICS["synaptic_saliency"](probe) == pytest.approx(saliency, rel=1e-9)

    def test_fisher_is_the_squared_slope_by_a_factor_of_each_channel(
        self, networks: list[Probe]
    ) -> None:
        for probe in networks:
            total, batch = 0.0, len(probe.inputs)
            for module in probe.network.modules():
                if not isinstance(module, Linear):
                    continue
                mask_BN = torch.ones(batch, len(module.weight), dtype=torch.float64)
                mask_BN.requires_grad_()

                def scale(module: Linear, inputs: object, out: Tensor, mask: Tensor = mask_BN):
                    # Bidirectional recurrences have both directions on the first axis.
                    mask = mask.repeat(len(out) // len(mask), 1)
                    return out * (mask if out.ndim == 2 else mask[:, None])

                handle = module.register_forward_hook(scale)
                (slope_BN,) = torch.autograd.grad(loss_of(probe), mask_BN, materialize_grads=True)
                handle.remove()
                for channel in range(slope_BN.shape[1]):
                    total += (slope_BN[:, channel] ** 2).mean().item() / 2
            assert METRICS["fisher"](probe) == pytest.approx(total, rel=1e-9)

    def test_head_importance_is_the_slope_by_a_mask_of_each_head(
        self, networks: list[Probe]
    ) -> None:
        # Equation 2 of the paper as it stands: one sequence and one head at a time.
        for probe in networks:
            total, batch = 0.0, len(probe.inputs)
            for block in probe.network.blocks.values():
                if not isinstance(block, MixerBlock):
                    continue
                width = block.spec.head_dim
                for head in range(block.spec.num_heads):
                    mask_B = torch.ones(batch, dtype=torch.float64, requires_grad=True)
                    inside = torch.arange(block.spec.num_heads * width) // width == head
                    handle = block.op.output_linear().register_forward_pre_hook(
                        lambda module, inputs, inside=inside, mask_B=mask_B: torch.where(
                            inside, inputs[0] * mask_B[:, None, None], inputs[0]
                        )
                    )
                    (slope_B,) = torch.autograd.grad(loss_of(probe), mask_B)
                    handle.remove()
                    total += slope_B.abs().mean().item()
            assert METRICS["head_importance"](probe) == pytest.approx(total, rel=1e-9)

    def test_dss_of_softmax_in_closed_form(self) -> None:
        arch = make_arch(replace(LAYER, ffn="none", intermediate_size=0))
        probe = exact(arch)
        op, ones = probe.network.blocks["layer0_mixer"].op, np.ones(16)
        value, out, head = (
            linear.weight.detach().abs().numpy()
            for linear in (op.v_proj, op.o_proj, probe.network.ends.head)
        )
        tokens, column = make_batch()[0].shape[1], head.sum(axis=0)
        # Two query heads read each key/value head; equal values are their own mean.
        context = np.repeat((value @ ones).reshape(2, 8), 2, axis=0).ravel()
        pulled = (column @ out).reshape(2, 2, 8).sum(axis=1).ravel()
        total = (head * (ones + out @ context)).sum()
        for weight, gradient in (
            (out, np.outer(column, context)),
            (value, np.outer(pulled, ones)),
        ):
            total += np.linalg.norm(weight, "nuc") * np.linalg.norm(gradient, "nuc")
        assert METRICS["dss"](probe) == pytest.approx(math.log(tokens * total), rel=1e-7)

    def test_dss_without_mixers_is_synflow(self) -> None:
        probe = exact(make_arch(replace(LAYER, mixer="none"), replace(LAYER, mixer="pool")))
        assert METRICS["dss"](probe) == pytest.approx(METRICS["synflow"](probe), rel=1e-12)

    def test_dss_of_many_layers_does_not_overflow(self) -> None:
        deep = [
            METRICS["dss"](exact(make_arch(*[replace(LAYER, mixer="mamba")] * depth, d_model=64)))
            for depth in (20, 80)
        ]
        assert deep[1] > 710 > deep[0] > 0

    def test_jacobian_cosine_by_pairs(self, networks: list[Probe]) -> None:
        for probe in networks:
            rows = probe.loss_pass.jacobian_BTD.flatten(1)
            total, count = 0.0, len(rows)
            for i in range(count):
                for j in range(count):
                    if i != j:
                        cosine = F.cosine_similarity(rows[i], rows[j], dim=0).abs().item()
                        total += cosine ** (1 / 20)
            expected = 1 - total / (2 * (count**2 - count))
            assert METRICS["jacobian_cosine"](probe) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("shape", [(7, 7), (5, 40), (40, 5), (1, 9)])
    def test_nuclear_norm(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        full = torch.randn(shape, generator=generator)
        low_rank = full[:, :1] @ full[:1]
        for matrix in (full, low_rank, torch.zeros(shape)):
            expected = torch.linalg.svdvals(matrix.double()).sum().item()
            assert nuclear_norm(matrix) == pytest.approx(expected, rel=1e-6)


def finite_difference_grasp(probe: Probe) -> float:
    """-<W, H g> from the gradients a small step up and down the gradient."""
    weights, grads = linear_weights(probe.network), gradients_of(probe)
    step = 1e-6 / max(grad.abs().max().item() for grad in grads.values())
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            before = {name: weight.clone() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight += sign * step * grads[name]
        found.append(gradients_of(probe))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
    return -sum(
        (weight.detach() * (found[0][name] - found[1][name])).sum().item() / (2 * step)
        for name, weight in weights.items()
    )


class TestGrasp:
    @pytest.mark.parametrize("operator", [*MIXERS, *FFNS])
    def test_finite_differences(self, operator: str) -> None:
        change = {"mixer" if operator in MIXERS else "ffn": operator}
        probe = exact(make_arch(replace(LAYER, **change)))
        expected = finite_difference_grasp(probe)
        assert METRICS["grasp"](probe) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("mixer", ["softmax", "mamba", "qrnn", "rwkv_timemix", "retention"])
    def test_finite_differences_in_both_directions(self, mixer: str) -> None:
        probe = exact(make_arch(replace(LAYER, mixer=mixer), family=ENCODER))
        expected = finite_difference_grasp(probe)
        assert METRICS["grasp"](probe) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.skipif(not triton_available(), reason="triton is not installed")
    def test_kernels_make_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arch = make_arch(replace(LAYER, mixer="gla"))
        expected = METRICS["grasp"](Probe(arch, batch_for(arch), SEED))
        monkeypatch.setenv("NAS_KERNELS", "triton")
        assert METRICS["grasp"](Probe(arch, batch_for(arch), SEED)) == expected

    @pytest.mark.parametrize("norm", ["prepbn", "unified_norm"])
    def test_finite_differences_through_norms_of_batches(self, norm: str) -> None:
        probe = exact(make_arch(replace(LAYER, norm=norm), family=ENCODER))
        assert METRICS["grasp"](probe) == pytest.approx(finite_difference_grasp(probe), rel=1e-4)

    def test_says_why_where_there_is_no_second_derivative(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(twice, "DEFINITIONS", {})
        for mixer in ("mingru", "qrnn", "rwkv_timemix", "mamba"):
            probe = exact(make_arch(replace(LAYER, mixer=mixer)))
            with pytest.raises(UserError, match="an operation's gradient has no gradient itself"):
                METRICS["grasp"](probe)

    def test_leaves_the_fast_operations_in_place(self) -> None:
        probe = exact(make_arch(replace(LAYER, mixer="mingru")))
        with pytest.raises(ZeroDivisionError), twice.twice_differentiable():
            raise ZeroDivisionError
        METRICS["grasp"](probe)
        for operation in twice.DEFINITIONS:
            assert operation.apply == super(operation, operation).apply
        assert all(parameter.grad is None for parameter in probe.network.parameters())


class TestProbe:
    def test_a_batch_norm_is_that_of_the_first_batch(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, slope = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
        norm = UnifiedNorm(7).double()
        with torch.no_grad():
            norm.weight.normal_(generator=generator)
            norm.bias.normal_(generator=generator)
        results = []
        for module in (FirstBatchNorm(norm), norm):
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            results.append((out, *torch.autograd.grad(out, [leaf, norm.weight, norm.bias], slope)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("family", [None, ENCODER, VIT])
    def test_deviations_of_inits(self, family: Family | None) -> None:
        arch = make_arch(LAYER, LAYER, d_model=64, family=family)
        for init in INITS:
            probe = Probe(arch, batch_for(arch), SEED, init=init)
            for name, weight in linear_weights(probe.network).items():
                if init == "fan_in" or name == "ends.patch_proj":
                    gain = 0.1 if name == "ends.head" else 1.0
                    # Two layers: output projections shrink by sqrt(2 * 2).
                    gain = 0.5 if name.endswith(("o_proj", "down_proj")) else gain
                    wanted = gain / math.sqrt(weight.shape[1])
                else:
                    wanted = NORMAL_STD
                low, high = wanted * (1 + np.array([-4, 4]) / math.sqrt(2 * weight.numel()))
                assert low < weight.std().item() < high, (init, name)
            again = Probe(arch, batch_for(arch), SEED, init=init)
            for name, tensor in again.network.state_dict().items():
                assert torch.equal(tensor, probe.network.state_dict()[name])
            assert all(math.isfinite(METRICS[name](probe)) for name in NAMES)

    @pytest.mark.parametrize("init", INITS)
    def test_equal_sub_blocks_of_two_archs_have_equal_weights(self, init: str) -> None:
        other = replace(LAYER, ffn="swiglu", intermediate_size=40)
        first, second = (
            Probe(make_arch(*layers), make_batch(), SEED, init=init).network
            for layers in ((LAYER, LAYER), (other, LAYER))
        )
        equal = {
            name: torch.equal(weight, linear_weights(second)[name])
            for name, weight in linear_weights(first).items()
            if not name.startswith("blocks.layer0_ffn")
        }
        assert all(equal.values()), equal
        q_0, q_1 = (first.blocks[f"layer{i}_mixer"].op.q_proj.weight for i in (0, 1))
        assert not torch.equal(q_0, q_1)

    def test_scores_take_an_init(self) -> None:
        archs, batch = [make_arch(LAYER)], make_batch()
        own = score_archs([*NAMES, *FAN_IN], archs, batch, SEED)
        for init in INITS:
            for name, values in score_archs(list(own), archs, batch, SEED, init=init).items():
                is_own = (name in FAN_IN) == (init == "fan_in")
                assert (values[0] == own[name][0]) == is_own, (name, init)
        with pytest.raises(UserError, match="normal"):
            score_archs(["snip"], archs, batch, SEED, init="norml")
