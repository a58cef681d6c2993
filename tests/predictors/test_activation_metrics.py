"""Activation metrics against a network run by hand, in loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from predictors.zero_cost import METRICS, Probe
from predictors.zero_cost.block_linearity import linearity, principal_scores
from predictors.zero_cost.components import num_components
from searchspace.arch import Arch, LayerArch
from searchspace.family import DECODER, Family
from searchspace.mixers.base import SharedKV
from searchspace.specs import MixerSpec

VOCAB, CLASSES, SEED, PAD = 31, 5, 5, 0
ENCODER = Family(
    kind="encoder", num_classes=CLASSES, embedding_position="learned", max_tokens=64, pad_token=PAD
)
CLASS_TOKEN = replace(ENCODER, pooling="class_token")
VIT = Family(
    kind="vit", num_classes=CLASSES, image_size=8, channels=1, patch_size=2, pooling="class_token",
    embedding_position="learned",
)  # fmt: skip
LAYER = LayerArch(
    mixer="softmax", num_heads=4, num_kv_heads=2, position="rope", ffn="gelu", intermediate_size=24
)


def make_arch(*layers: LayerArch, family: Family = DECODER, d_model: int = 16) -> Arch:
    vocab_size = 0 if family.kind == "vit" else VOCAB
    return Arch(d_model=d_model, head_dim=8, vocab_size=vocab_size, layers=layers, family=family)


def batch_for(arch: Arch, sequences: int = 4, tokens: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(sequences) % CLASSES
    if arch.family.kind == "vit":
        return torch.randn(sequences, 1, 8, 8, generator=generator), classes
    inputs = torch.randint(1, VOCAB, (sequences, tokens), generator=generator)
    if arch.family.kind == "decoder":
        return inputs, inputs
    inputs[0, tokens // 2 :] = PAD
    inputs[-1, tokens - 1 :] = PAD
    return inputs, classes


def make_probe(arch: Arch, dtype: torch.dtype = torch.float64, **size: int) -> Probe:
    return Probe(arch, batch_for(arch, **size), SEED, dtype)


@dataclass
class Step:
    """One sub-block, run by hand."""

    name: str
    op: nn.Module
    given: Tensor
    out: Tensor
    after: Tensor
    shared: SharedKV


def walk(probe: Probe) -> Iterator[Step]:
    """Run the pre-norm blocks one by one."""
    network = probe.network
    with torch.no_grad():
        x, shared = network.ends.embed(probe.inputs), SharedKV()
        yield Step("embedding", network.ends, x, x, x, shared)
        for name, block in network.blocks.items():
            given = block.norm(x)
            arguments = (None, shared) if getattr(block.op, "shares_kv", False) else ()
            out = block.op(given, *arguments)
            x = x + out
            yield Step(name, block.op, given, out, x, shared)


def read_by(step: Step, linear: str) -> Tensor:
    """What one of an operator's maps reads."""
    read: list[Tensor] = []
    hook = getattr(step.op, linear).register_forward_pre_hook(lambda _, x: read.append(x[0]))
    with torch.no_grad():
        step.op(step.given)
    hook.remove()
    return read[0]


def tokens_of(probe: Probe) -> list[list[int]]:
    """Positions inside the network that are no padding, for every sequence."""
    kind = probe.arch.family.kind
    count, first = probe.num_tokens, probe.arch.family.num_extra_tokens
    found = []
    for row in probe.inputs:
        if kind == "encoder":
            found.append([0] * first + [t + first for t, i in enumerate(row.tolist()) if i != PAD])
        else:
            found.append(list(range(count)))
    return found


def rows_of(probe: Probe, x_BTC: Tensor) -> np.ndarray:
    kept = tokens_of(probe)
    return np.stack([x_BTC[b, t].numpy() for b in range(len(kept)) for t in kept[b]])


def mixed_layers(family: Family) -> list[LayerArch]:
    return [
        LAYER,
        replace(LAYER, kv_shared=True, ffn="swiglu"),
        LayerArch(),
        replace(LAYER, mixer="gla", ffn="relu2"),
        replace(LAYER, mixer="mamba" if family.causal else "fourier", ffn="rwkv_channelmix"),
        replace(LAYER, mixer="diag_block", ffn="none", intermediate_size=0),
        replace(LAYER, mixer="none", ffn="relu"),
    ]


FAMILIES = {"decoder": DECODER, "encoder": ENCODER, "class_token": CLASS_TOKEN, "vit": VIT}


@pytest.fixture(scope="module", params=FAMILIES)
def probe(request: pytest.FixtureRequest) -> Probe:
    family = FAMILIES[request.param]
    return make_probe(make_arch(*mixed_layers(family), family=family))


class TestDefinitions:
    def test_head_confidence(self, probe: Probe) -> None:
        expected, kept = 0.0, tokens_of(probe)
        for step in walk(probe):
            for part in ("q_proj", "k_proj", "v_proj"):
                if hasattr(step.op, part):
                    weight = getattr(step.op, part).weight.detach()
                    out = F.linear(step.given, weight / weight.square().mean().sqrt()).detach()
                    largest = [
                        out[b, t].max(dim=0).values.mean().item() for b, t in enumerate(kept)
                    ]
                    expected += sum(largest) / len(largest)
        assert METRICS["head_confidence"](probe) == pytest.approx(expected, rel=1e-12)

    def test_softmax_confidence(self, probe: Probe) -> None:
        expected, kept = 0.0, tokens_of(probe)
        for step in walk(probe):
            spec = getattr(step.op, "spec", None)
            if not isinstance(spec, MixerSpec) or spec.mixer not in ("softmax", "diag_block"):
                continue
            q = step.op.rotate(step.op.split_heads(step.op.q_proj(step.given)), 0)
            if spec.kv_shared:
                k = step.shared.k_BGSK
            else:
                k = step.op.rotate(step.op.split_heads(step.op.k_proj(step.given)), 0)
            largest = []
            for b, positions in enumerate(kept):
                for h, t in itertools.product(range(4), positions):
                    seen = t + 1 if probe.arch.family.causal else k.shape[2]
                    scores = k[b, h // 2, :seen] @ q[b, h, t] / math.sqrt(8)
                    largest.append(scores.softmax(dim=0).max().item())
            expected += np.mean(largest)
        assert METRICS["softmax_confidence"](probe) == pytest.approx(expected, rel=1e-10)

    def test_activation_distance(self, probe: Probe) -> None:
        expected, kept = 0.0, tokens_of(probe)
        for step in walk(probe):
            if not hasattr(step.op, "down_proj"):
                continue
            hidden = read_by(step, "down_proj")
            sums = []
            for b, positions in enumerate(kept):
                x = (hidden[b, positions] > 0).double().numpy()
                sums.append((x @ x.T + (1 - x) @ (1 - x).T).sum())
            expected += np.mean(sums)
        assert METRICS["activation_distance"](probe) == pytest.approx(expected, rel=1e-12)

    def test_hidden_covariance(self, probe: Probe) -> None:
        scores, kept = [], tokens_of(probe)
        for step in walk(probe):
            if not step.name.endswith("mixer"):
                continue
            rows = np.zeros(step.out.shape)
            for b, positions in enumerate(kept):
                rows[b, positions] = step.out[b, positions].numpy()
            values = np.linalg.eigvals(np.corrcoef(rows.reshape(len(rows), -1))).real + 1e-5
            scores.append(-sum(math.log(v) + 1 / v for v in values))
        assert METRICS["hidden_covariance"](probe) == pytest.approx(np.mean(scores), rel=1e-8)

    def test_v_pca_and_w_pca(self, probe: Probe) -> None:
        whole = 0
        for step in walk(probe):
            if hasattr(step.op, "up_proj"):
                maps = [m for m in ("gate_proj", "up_proj") if hasattr(step.op, m)]
                given = read_by(step, "up_proj")
                out = torch.cat([F.linear(given, getattr(step.op, m).weight) for m in maps], -1)
                rows = rows_of(probe, out.detach())
                rows = rows[:: -(-len(rows) // 32)]
                variance = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
                number, share = 0, 0.0
                while share < 0.99:
                    share += variance[number] / variance.sum()
                    number += 1
                whole += number
        count = METRICS["v_pca"](probe)
        num_ffns = sum(layer.intermediate_size > 0 for layer in probe.arch.layers)
        assert whole - num_ffns <= count <= whole
        assert METRICS["w_pca"](probe) == count * METRICS["params"](probe)

    def test_signal_propagation(self, probe: Probe) -> None:
        drift = [abs(math.log((rows_of(probe, s.after) ** 2).mean())) for s in walk(probe)]
        assert METRICS["signal_propagation"](probe) == pytest.approx(-np.mean(drift), rel=1e-10)

    def test_block_linearity_by_least_squares(self) -> None:
        # Enough tokens for a 6 x 6 map, so that no components are left out.
        probe = make_probe(
            make_arch(*mixed_layers(ENCODER), family=ENCODER, d_model=6), sequences=6
        )
        rows = {s.name.split("_")[0]: rows_of(probe, s.after) for s in walk(probe)}
        assert len(rows["embedding"]) > 13
        scores = []
        for x, y in itertools.pairwise(rows.values()):
            x, y = x - x.mean(axis=0), y - y.mean(axis=0)
            x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
            error = ((x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) ** 2).sum()
            scores.append(1 - error * (len(x) - 1) / (len(x) - 1 - 6))
        assert METRICS["block_linearity"](probe) == pytest.approx(np.mean(scores), rel=1e-9)

    def test_zen_of_one_ffn_by_hand(self) -> None:
        arch = make_arch(replace(LAYER, mixer="none", ffn="relu"), d_model=6)
        probe = make_probe(arch)
        op = probe.network.blocks["layer0_ffn"].op
        up, down = (w.weight.detach().numpy() for w in (op.up_proj, op.down_proj))
        up, down = up / np.sqrt((up**2).mean()), down / np.sqrt((down**2).mean())
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(4, 11, 6, generator=generator, dtype=torch.float64)
        noise = torch.randn(4, 11, 6, generator=generator, dtype=torch.float64)
        changed = x + 0.01 * noise

        def features(x: Tensor) -> np.ndarray:
            normal = probe.network.blocks["layer0_ffn"].norm(x).detach().numpy()
            return x.numpy() + np.maximum(normal @ up.T, 0) @ down.T

        expected = math.log(np.abs(features(x) - features(changed)).mean())
        assert METRICS["zen"](probe) == pytest.approx(expected, rel=1e-9)

    def test_zen_leaves_the_network_alone(self) -> None:
        probe = make_probe(make_arch(LAYER))
        before = {name: p.clone() for name, p in probe.network.named_parameters()}
        METRICS["zen"](probe)
        for name, parameter in probe.network.named_parameters():
            assert torch.equal(parameter, before[name])

    def test_every_activation_of_a_stack_counts(self) -> None:
        layer = replace(LAYER, ffn="gelu_stack", ffn_options=(("inner_size", 8), ("num_inner", 2)))
        probe = make_probe(make_arch(replace(layer, mixer="none")))
        step = list(walk(probe))[1]
        expected, hidden = 0.0, step.given
        for linear in (step.op.up_proj, *step.op.inner):
            with torch.no_grad():
                hidden = F.gelu(linear(hidden))
            for x in (hidden > 0).double():
                expected += float((x @ x.T + (1 - x) @ (1 - x).T).sum()) / len(hidden)
        assert METRICS["activation_distance"](probe) == pytest.approx(expected, rel=1e-12)


class TestComponents:
    @pytest.mark.parametrize("shape", [(40, 7), (7, 40), (12, 12)])
    def test_counts_as_singular_values_do(self, shape: tuple[int, int]) -> None:
        rng = np.random.default_rng(0)
        rows = rng.normal(size=shape) * np.geomspace(1, 1e-2, shape[1]) + 3.0
        squares = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
        whole = int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.99)) + 1
        for dtype in (torch.float32, torch.float64):
            count = num_components(torch.tensor(rows, dtype=dtype), 0.99)
            assert math.ceil(count) == whole

    def test_grows_evenly_where_the_whole_number_jumps(self) -> None:
        def count(small: float) -> float:
            rows = torch.diag(torch.tensor([1.0, small], dtype=torch.float64))
            return num_components(torch.cat([rows, -rows]), 0.99)

        edge = math.sqrt(0.01 / 0.99)
        assert count(edge * (1 + 1e-9)) == pytest.approx(count(edge * (1 - 1e-9)), abs=1e-6)
        assert count(0.0) == pytest.approx(0.99)

    @pytest.mark.parametrize("num_rows", [1, 9])
    def test_equal_rows_have_none(self, num_rows: int) -> None:
        row = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)) + 100.0
        assert num_components(row.expand(num_rows, -1), 0.99) == 0.0
        assert num_components(torch.zeros(num_rows, 5), 0.99) == 0.0


class TestLinearity:
    @pytest.mark.parametrize("width", [5, 200])
    def test_linear_maps_explain_all(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(5, width, generator=generator, dtype=torch.float64)
        y = x @ torch.randn(width, width, generator=generator, dtype=torch.float64) + 7.0
        found = linearity(principal_scores("x", x), principal_scores("y", y))
        assert found == pytest.approx(1.0, abs=1e-9)

    @pytest.mark.parametrize("width", [8, 64, 300])
    def test_unrelated_streams_have_none_whatever_the_width(self, width: int) -> None:
        # Unadjusted, the 300 unknowns would explain half of the 128 tokens by chance.
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(10):
            x, y = torch.randn(2, 128, width, generator=generator, dtype=torch.float64)
            found.append(linearity(principal_scores("x", x), principal_scores("y", y)))
        assert np.mean(found) == pytest.approx(0.0, abs=0.05)

    def test_larger_branches_are_less_linear(self) -> None:
        probes = [make_probe(make_arch(replace(LAYER, mixer="none"))) for _ in range(2)]
        with torch.no_grad():
            probes[1].network.blocks["layer0_ffn"].op.down_proj.weight.mul_(10.0)
        mild, strong = (METRICS["block_linearity"](probe) for probe in probes)
        assert 1.0 > mild > strong + 0.05
