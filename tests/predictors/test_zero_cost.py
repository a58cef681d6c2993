from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from predictors.zero_cost import INITS, METRICS, Probe, score_arch, score_archs
from predictors.zero_cost.loss_pass import check_gradients, linear_weights
from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.family import DECODER, Family
from searchspace.ffn import FFNS
from searchspace.linear import Linear
from searchspace.mixers import MIXERS
from searchspace.norms import NORMS
from searchspace.precisions import PRECISIONS
from searchspace.specs import PLACEMENTS
from searchspace.subnet import Subnet

VOCAB, CLASSES, SEED = 31, 5, 5
LAYER = LayerArch(
    mixer="softmax", num_heads=4, num_kv_heads=2, position="rope", ffn="relu2", intermediate_size=24
)
ENCODER = Family(
    kind="encoder", num_classes=CLASSES, embedding_position="learned", max_tokens=64, pad_token=0
)
VIT = Family(
    kind="vit",
    num_classes=CLASSES,
    image_size=8,
    channels=1,
    patch_size=2,
    pooling="class_token",
    embedding_position="learned",
    final_norm="layernorm",
)


def make_arch(*layers: LayerArch, d_model: int = 16, family: Family | None = None) -> Arch:
    """A decoder where every mixer has a causal form, else an encoder."""
    if family is None:
        mixers = [MIXERS[layer.mixer] for layer in layers if layer.mixer != "none"]
        causal = all("causal" in mixer.directions for mixer in mixers)
        family = DECODER if causal else ENCODER
    vocab_size = 0 if family.kind == "vit" else VOCAB
    return Arch(d_model=d_model, head_dim=8, vocab_size=vocab_size, layers=layers, family=family)


def make_batch(sequences: int = 4, tokens: int = 12, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    text = torch.randint(
        0, vocab, (sequences, tokens + 1), generator=torch.Generator().manual_seed(1)
    )
    return text[:, :-1], text[:, 1:]


def batch_for(arch: Arch, sequences: int = 4, tokens: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if arch.family.kind == "decoder":
        return make_batch(sequences, tokens)
    classes = torch.arange(sequences) % CLASSES
    if arch.family.kind == "vit":
        return torch.randn(sequences, 1, 8, 8, generator=generator), classes
    inputs = torch.randint(1, VOCAB, (sequences, tokens), generator=generator)
    inputs[0, tokens // 2 :] = 0  # padding
    return inputs, classes


def every_layer() -> list[LayerArch]:
    """All mixers with a few FFNs, all FFNs with softmax; norms and precisions take turns."""
    pairs = [(mixer, ffn) for mixer in MIXERS for ffn in ("swiglu", "none")]
    pairs += [("softmax", ffn) for ffn in FFNS] + [("none", ffn) for ffn in FFNS]
    # Their numbers have no common divisor with each other's, so all pairs come up.
    norms, precisions = itertools.cycle(NORMS), itertools.cycle(PRECISIONS)
    return [
        replace(
            LAYER,
            mixer=mixer,
            ffn=ffn,
            intermediate_size=0 if ffn == "none" else 24,
            norm=next(norms),
            mixer_precision=next(precisions),
            ffn_precision=next(precisions),
        )
        for mixer, ffn in pairs
    ]


def score(name: str, arch: Arch, batch: tuple[Tensor, Tensor] | None = None) -> float:
    return score_arch(name, arch, batch or batch_for(arch), np.random.default_rng(SEED))


def same_network(arch: Arch) -> Subnet:
    """The network that `score` looks at, of a metric taken at weights of one deviation."""
    network = Subnet(arch)
    INITS["normal"](network, int(np.random.default_rng(SEED).integers(2**63 - 1)))
    return network


def task_loss(network: Subnet) -> Tensor:
    inputs, targets = make_batch()
    return F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())


@pytest.fixture(scope="module")
def mixed() -> Arch:
    gla = replace(LAYER, mixer="gla", ffn="swiglu", norm="layernorm")
    return make_arch(LAYER, LayerArch(), gla)


class TestEveryMetric:
    def test_scores_every_operator_combination(self) -> None:
        # A skipped slot between two equal layers; slow on the first sight of a size: flops.
        names = [name for name in METRICS if name != "flops"]
        for layer in every_layer():
            arch = make_arch(layer, LayerArch(), layer)
            scores = score_archs(names, [arch], batch_for(arch, 2, 7), SEED)
            for name, values in scores.items():
                assert np.isfinite(values).all(), (name, layer)

    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_scores_placements_and_shared_keys_and_values(self, placement: str) -> None:
        layer = replace(LAYER, norm_placement=placement)
        sharing = replace(layer, kv_shared=True)
        arch = make_arch(layer, sharing, sharing)
        assert [item.kv_shared for item in arch.layers] == [False, True, True]
        scores = score_archs(list(METRICS), [arch, make_arch(layer, layer, layer)], make_batch(), 0)
        for name, (shared, own) in scores.items():
            assert math.isfinite(shared) and shared != own, name
        assert scores["params"][0] < scores["params"][1]

    @pytest.mark.parametrize("family", [ENCODER, VIT], ids=["encoder", "vit"])
    @pytest.mark.parametrize("name", METRICS)
    def test_scores_networks_that_classify(self, name: str, family: Family) -> None:
        linear = replace(LAYER, mixer="retention", ffn="swiglu", norm="unified_norm")
        small, large = (make_arch(*layers, family=family) for layers in ([LAYER], [LAYER, linear]))
        values = [score(name, arch) for arch in (small, large)]
        assert np.isfinite(values).all()
        # Retention has no softmax to be confident in.
        assert values[0] != values[1] or name == "softmax_confidence"
        torch.manual_seed(3)
        assert values == [score(name, arch) for arch in (small, large)]
        if name in ("params", "flops", "synflow", "grad_norm", "snip"):
            assert values[0] < values[1]
        if name not in ("params", "flops"):
            again = score_arch(name, large, batch_for(large), np.random.default_rng(SEED + 1))
            assert again != values[1]

    def test_scores_a_network_without_layers(self) -> None:
        scores = score_archs(list(METRICS), [make_arch(LayerArch())], make_batch(), SEED)
        assert scores["naswot"][0] == 0.0
        assert scores["snip"][0] > 0.0

    @pytest.mark.parametrize("name", METRICS)
    def test_depends_on_nothing_but_its_arguments(self, name: str, mixed: Arch) -> None:
        torch.manual_seed(0)
        alone = score(name, mixed)
        torch.manual_seed(1)
        together = score_archs(list(METRICS), [make_arch(LAYER), mixed], make_batch(), SEED)
        assert together[name][1] == alone

    @pytest.mark.parametrize("name", ["grad_norm", "snip", "synflow", "naswot", "jacob_cov"])
    def test_another_seed_gives_other_weights(self, name: str, mixed: Arch) -> None:
        assert score_arch(name, mixed, make_batch(), np.random.default_rng(SEED + 1)) != score(
            name, mixed
        )

    @pytest.mark.parametrize("operator", [*MIXERS, *FFNS])
    def test_fp32_agrees_with_fp64(self, operator: str) -> None:
        # A score made of rounding noise would not.
        change = {"mixer" if operator in MIXERS else "ffn": operator}
        for norm, family in (("layernorm", None), ("prepbn", ENCODER), ("unified_norm", VIT)):
            layer = replace(LAYER, norm=norm, **change)
            arch = make_arch(layer, layer, family=family)
            low, high = (
                Probe(arch, batch_for(arch), SEED, dtype)
                for dtype in (torch.float32, torch.float64)
            )
            for name in ("grad_norm", "snip", "jacob_cov"):
                assert METRICS[name](low) == pytest.approx(METRICS[name](high), rel=2e-4), name
            # A unit that is all but zero may fall on either side.
            assert METRICS["naswot"](low) == pytest.approx(METRICS["naswot"](high), rel=5e-3)

    @pytest.mark.parametrize("name", ["grad_norm", "snip"])
    def test_int8_agrees_with_fp64_up_to_rounding(self, name: str) -> None:
        arch = make_arch(replace(LAYER, mixer_precision="int8", ffn_precision="int8"))
        low, high = (
            METRICS[name](Probe(arch, make_batch(), SEED, dtype))
            for dtype in (torch.float32, torch.float64)
        )
        assert low == pytest.approx(high, rel=0.03)

    def test_progress_is_told_after_every_arch(self, mixed: Arch) -> None:
        seen: list[tuple[int, int]] = []
        score_archs(["params"], [mixed] * 3, make_batch(), 0, lambda i, n: seen.append((i, n)))
        assert seen == [(1, 3), (2, 3), (3, 3)]


class TestDefinitions:
    def test_params_counts_the_built_network(self, mixed: Arch) -> None:
        assert score("params", mixed) == sum(p.numel() for p in Subnet(mixed).parameters())

    def test_flops_counts_the_run_network(self, mixed: Arch) -> None:
        # PyTorch has no FLOP count for the CPU's fused attention, but for what meta tensors run.
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            Subnet(mixed)(torch.zeros(1, make_batch()[0].shape[1], dtype=torch.long))
        assert score("flops", mixed) == pytest.approx(counter.get_total_flops(), rel=1e-9)

    def test_grad_norm_and_snip_from_plain_backward(self, mixed: Arch) -> None:
        network = same_network(mixed)
        task_loss(network).backward()
        norms, saliency = 0.0, 0.0
        for module in network.modules():
            if isinstance(module, Linear):
                norms += module.weight.grad.norm().item()
                saliency += (module.weight.grad * module.weight).abs().sum().item()
        assert score("grad_norm", mixed) == pytest.approx(norms, rel=1e-5)
        assert score("snip", mixed) == pytest.approx(saliency, rel=1e-5)

    def test_snip_predicts_the_loss_without_a_weight(self, mixed: Arch) -> None:
        # |w g| is the first-order change of the loss when w is scaled away.
        network = same_network(mixed).double()
        weight = network.blocks["layer0_ffn"].op.up_proj.weight
        before = task_loss(network)
        (grad,) = torch.autograd.grad(before, weight)
        with torch.no_grad():
            weight[3, 4] *= 1 - 1e-4
        change = (task_loss(network) - before).item() / 1e-4
        assert change == pytest.approx(-(weight[3, 4] * grad[3, 4]).item(), rel=1e-3)

    def test_synflow_of_one_ffn_in_closed_form(self) -> None:
        arch = make_arch(replace(LAYER, mixer="none", norm="layernorm"))
        network = same_network(arch).double()
        op = network.blocks["layer0_ffn"].op
        up, down = (w.weight.detach().abs().numpy() for w in (op.up_proj, op.down_proj))
        head = network.ends.head.weight.detach().abs().numpy()
        tokens, ones = make_batch()[0].shape[1], np.ones(16)
        hidden = up @ ones
        column = head.sum(axis=0)
        flow_head = (head * (ones + down @ hidden**2)).sum()
        flow_down = (column[:, None] * down * hidden**2).sum()
        # d relu(h)^2 / dh = 2 h, so the flow into the first matrix counts twice.
        flow_up = 2 * flow_down
        expected = math.log(tokens * (flow_head + flow_down + flow_up))
        assert score("synflow", arch) == pytest.approx(expected, rel=1e-9)

    def test_synflow_of_softmax_goes_through_values_only(self) -> None:
        arch = make_arch(replace(LAYER, ffn="none", intermediate_size=0))
        network = same_network(arch).double()
        op = network.blocks["layer0_mixer"].op
        value, out = (w.weight.detach().abs().numpy() for w in (op.v_proj, op.o_proj))
        head = network.ends.head.weight.detach().abs().numpy()
        # Two query heads read each key/value head; equal values are their own mean.
        context = np.repeat((value @ np.ones(16)).reshape(2, 8), 2, axis=0).ravel()
        flow_out = (head.sum(axis=0)[:, None] * out * context).sum()
        flow_head = (head * (1 + out @ context)).sum()
        tokens = make_batch()[0].shape[1]
        expected = math.log(tokens * (flow_head + 2 * flow_out))
        assert score("synflow", arch) == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize("operator", [*MIXERS, *FFNS])
    def test_synflow_and_params_grow_with_depth_and_width(self, operator: str) -> None:
        layer = replace(LAYER, **{"mixer" if operator in MIXERS else "ffn": operator})
        wide = replace(layer, intermediate_size=96)
        archs = [make_arch(layer), make_arch(wide), make_arch(wide, wide)]
        archs += [make_arch(wide, wide, d_model=64)]
        scores = score_archs(["synflow", "params"], archs, batch_for(archs[0]), SEED)
        grows = np.diff(scores["synflow"]) > 0
        # Sines of larger keys are not larger, so only what the FFNs add is certain to grow.
        assert grows[0] if operator == "fourier_sf" else grows.all()
        assert (np.diff(scores["params"]) > 0).all()

    def test_synflow_of_many_layers_does_not_overflow(self) -> None:
        # Mamba's products of five positive maps give it the steepest flow of all.
        layer = replace(LAYER, mixer="mamba")
        archs = [make_arch(*[layer] * depth, d_model=64) for depth in (20, 40, 80)]
        few, more, many = (METRICS["synflow"](Probe(a, make_batch(), SEED)) for a in archs)
        assert many > 710  # the logarithm of the largest float64
        assert many - more == pytest.approx(2 * (more - few), rel=0.05)

    def test_naswot_by_counting(self, mixed: Arch) -> None:
        network, hidden = same_network(mixed), []
        for name in ("layer0_ffn", "layer2_ffn"):
            network.blocks[name].op.down_proj.register_forward_pre_hook(
                lambda module, inputs: hidden.append(inputs[0].flatten(0, 1))
            )
        network(make_batch()[0])
        agree = np.eye(48)
        for i, j in itertools.product(range(48), repeat=2):
            agree[i, j] += sum(((units[i] > 0) == (units[j] > 0)).sum().item() for units in hidden)
        expected = np.linalg.slogdet(agree)[1]
        assert score("naswot", mixed) == pytest.approx(expected, rel=1e-9)

    def test_naswot_looks_at_a_bounded_number_of_tokens(self) -> None:
        probe = Probe(make_arch(LAYER), make_batch(8, 64), SEED)
        assert [len(p) for p in probe.loss_pass.patterns] == [128]

    def test_jacob_cov_from_one_sequence_at_a_time(self, mixed: Arch) -> None:
        network = same_network(mixed).double()
        rows = []
        for tokens in make_batch()[0]:
            x = network.ends.embed(tokens[None]).detach().requires_grad_()
            out = x
            for block in network.blocks.values():
                out = block(out)
            (grad,) = torch.autograd.grad(network.ends.logits(out, tokens[None]).sum(), x)
            rows.append(grad.flatten().numpy())
        values = np.linalg.eigvals(np.corrcoef(rows)).real + 1e-5
        expected = -sum(math.log(v) + 1 / v for v in values)
        assert score("jacob_cov", mixed) == pytest.approx(expected, rel=1e-4)


class TestAlarms:
    @pytest.mark.parametrize("width", [16, 192])
    def test_a_sum_of_layer_normalised_outputs_is_refused(self, width: int) -> None:
        # The fault of a published benchmark: this loss is constant, its gradient rounding noise.
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(width, width, generator=generator) / width**0.5).requires_grad_()
        x = torch.randn(512, width, generator=generator)
        out = F.layer_norm(x @ weight, (width,))
        noise = torch.autograd.grad(out.sum() / len(x), weight, retain_graph=True)[0]
        assert (noise != 0).any()
        with pytest.raises(UserError, match="gradient vanishes"):
            check_gradients(out.sum().item() / len(x), {"w": weight}, {"w": noise})
        projected = (out @ torch.randn(width, generator=generator)).mean()
        check_gradients(
            projected.item(), {"w": weight}, {"w": torch.autograd.grad(projected, weight)[0]}
        )

    def test_a_vocabulary_of_one_token_is_refused(self) -> None:
        arch = replace(make_arch(LAYER), vocab_size=1)
        with pytest.raises(UserError, match=r"'snip' of arch \w+: the gradient vanishes"):
            score("snip", arch, make_batch(vocab=1))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_blow_up_are_refused(self, bad: float, mixed: Arch) -> None:
        probe = Probe(mixed, make_batch(), SEED)
        with torch.no_grad():
            probe.network.ends.head.weight[0, 0] = bad
        with pytest.raises(UserError, match="loss at random weights"):
            METRICS["grad_norm"](probe)

    def test_a_gradient_that_is_not_finite_is_refused(self) -> None:
        weights = {"a": torch.ones(2)}
        with pytest.raises(UserError, match="gradient of a at random weights is not finite"):
            check_gradients(1.0, weights, {"a": torch.tensor([1.0, math.nan])})

    def test_unknown_metric(self, mixed: Arch) -> None:
        with pytest.raises(UserError, match="did you mean 'synflow'"):
            score("synflo", mixed)

    def test_one_sequence_has_no_correlations(self, mixed: Arch) -> None:
        with pytest.raises(UserError, match="at least two"):
            score("jacob_cov", mixed, make_batch(1))

    @pytest.mark.parametrize(
        ("inputs", "targets", "sentence"),
        [
            (torch.zeros(2, 3).long(), torch.zeros(2, 4).long(), r"shape \(2, 3\)"),
            (torch.zeros(2, 3), torch.zeros(2, 3), "int64"),
            (torch.zeros(2, 3).long(), torch.full((2, 3), VOCAB), "ids 0 to 30"),
            (torch.zeros(2, 3).long(), torch.full((2, 3), -100), "none of the targets"),
            (torch.zeros(0, 3).long(), torch.zeros(0, 3).long(), "give tokens"),
        ],
    )
    def test_unfit_batches(self, inputs: Tensor, targets: Tensor, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            score("snip", make_arch(LAYER), (inputs, targets))

    def test_unfit_batches_of_networks_that_classify(self) -> None:
        encoder, vit = (make_arch(LAYER, family=family) for family in (ENCODER, VIT))
        tokens, images = batch_for(encoder), batch_for(vit)
        for arch, batch, sentence in (
            (encoder, (tokens[0], tokens[0]), r"'encoder'; give targets of shape \(4,\)"),
            (encoder, (tokens[0], tokens[1] + 5), "ids 0 to 4"),
            (encoder, images, "give tokens"),
            (vit, tokens, r"'vit'; give images \(batch, 1, 8, 8\)"),
        ):
            with pytest.raises(UserError, match=sentence):
                score("snip", arch, batch)

    def test_saliencies_cover_every_linear_map(self, mixed: Arch) -> None:
        matrices = {n for n, p in Subnet(mixed).named_parameters() if p.ndim == 2}
        assert set(linear_weights(Subnet(mixed))) == {
            name.removesuffix(".weight") for name in matrices - {"ends.embedding"}
        }
