"""Embeddings of their own width and with a norm, and networks without a final norm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from searchspace.arch import Arch, LayerArch
from searchspace.cost import arch_cost, num_params
from searchspace.ends import Ends, example_inputs
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.importance import order_by_importance
from searchspace.norms import NORMS
from searchspace.rewrites import fold_norms, rewrite
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec
from searchspace.sub_blocks import param_axes
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

VOCAB, WIDTH, TOKENS = 13, 6, 7
BERT = Family(
    "encoder", num_classes=3, pooling="class_token", embedding_position="learned", max_tokens=9,
    final_norm="none", embedding_size=WIDTH, embedding_norm="layernorm",
)  # fmt: skip
VIT = Family(
    "vit", num_classes=3, image_size=4, channels=2, patch_size=2, embedding_size=WIDTH,
    embedding_position="learned", embedding_norm="rmsnorm",
)  # fmt: skip
DECODER = Family(embedding_size=WIDTH)
FAMILIES = {"bert": BERT, "vit": VIT, "decoder": DECODER}
LAYER = LayerArch("softmax", 2, 2, "rope", ffn="gelu", intermediate_size=10, norm="layernorm")


def make_ends(family: Family, d_model: int, seed: int = 0) -> Ends:
    ends = Ends(EndsSpec(d_model, 0 if family.kind == "vit" else VOCAB, family))
    generator = torch.Generator().manual_seed(seed)
    ends.reset(generator)
    with torch.no_grad():
        for parameter in ends.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return ends


def make_inputs(spec: EndsSpec) -> Tensor:
    return example_inputs(spec, 2, TOKENS, torch.Generator().manual_seed(1))


def space_of(family: Family, d_model: tuple[int, ...]) -> SearchSpace:
    return SearchSpace(
        name="embedded",
        vocab_size=0 if family.kind == "vit" else VOCAB,
        d_model=d_model,
        head_dim=4,
        num_layers=2,
        mixers={"softmax": {}},
        heads=((2, 2), (1, 1)),
        intermediate_size=(10,),
        norm=("layernorm",),
        norm_placement=("post",),
        family=family,
    )


@torch.no_grad()
@pytest.mark.parametrize("d_model", [4, 6, 10])
def test_embedding_against_loops(d_model: int) -> None:
    ends = make_ends(BERT, d_model)
    tokens = make_inputs(ends.spec)
    rows = []
    for sequence in tokens:
        vectors = [ends.class_token[0]]
        vectors += [ends.embedding[t] + ends.positions[i] for i, t in enumerate(sequence)]
        for v in vectors:
            normed = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
            normed = normed * ends.embedding_norm.weight + ends.embedding_norm.bias
            rows.append(normed if d_model == WIDTH else ends.embedding_proj.weight @ normed)
    expected = torch.stack(rows).reshape(2, TOKENS + 1, d_model)
    torch.testing.assert_close(ends.embed(tokens), expected, rtol=1e-4, atol=1e-5)
    # Without a final norm the head reads the class token as it is.
    x = torch.randn(2, TOKENS + 1, d_model, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ends.logits(x, tokens), x[:, 0] @ ends.head.weight.T)


def test_no_map_where_the_widths_agree() -> None:
    assert make_ends(BERT, WIDTH).embedding_proj is None
    assert "embedding_proj.weight" not in dict(make_ends(BERT, WIDTH).named_parameters())
    assert make_ends(BERT, 10).embedding_proj is not None
    plain = make_ends(replace(BERT, embedding_size=0, embedding_norm="none"), 10)
    assert plain.embedding_proj is None and plain.embedding.shape == (VOCAB, 10)


@pytest.mark.parametrize("d_model", [WIDTH, 10])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["none", *NORMS])
def test_axes_and_gradients(name: str, d_model: int, norm: str) -> None:
    ends = make_ends(replace(FAMILIES[name], embedding_norm=norm), d_model).train()
    axes, family = param_axes(ends.spec), ends.family
    sizes = {
        "d_model": d_model, "embedding_size": WIDTH, "vocab_size": VOCAB, "one": 1,
        "num_classes": 3, "max_tokens": family.max_tokens, "patch_values": 8,
    }  # fmt: skip
    assert {n: tuple(sizes.get(a, p.shape[i]) for i, a in enumerate(axes[n]))
            for n, p in ends.named_parameters()} == {
        n: tuple(p.shape) for n, p in ends.named_parameters()
    }  # fmt: skip
    assert set(axes) == {n for n, _ in ends.named_parameters()}
    buffers = Ends.buffer_axes(ends.spec)
    assert set(buffers) == {n for n, _ in ends.named_buffers()}
    inputs, generator = make_inputs(ends.spec), torch.Generator().manual_seed(3)
    x_BTD = ends.embed(inputs)
    for out in (x_BTD, ends.logits(x_BTD, inputs)):
        (out * torch.randn(out.shape, generator=generator)).sum().backward(retain_graph=True)
    for parameter_name, parameter in ends.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), parameter_name


@torch.no_grad()
def test_reset_sets_everything() -> None:
    ends = Ends(EndsSpec(10, VOCAB, BERT))
    for name in ("embedding", "positions", "class_token", "embedding_proj", "head"):
        value = getattr(ends, name)
        (value.weight if isinstance(value, nn.Module) else value).fill_(torch.nan)
    ends.reset(torch.Generator().manual_seed(0))
    assert all(torch.isfinite(parameter).all() for parameter in ends.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("d_models", [(10, 4), (10, 6, 4), (6, 4), (6,)])
def test_shared_weights(name: str, d_models: tuple[int, ...]) -> None:
    space = space_of(FAMILIES[name], d_models)
    supernet = Supernet(space, torch.Generator().manual_seed(0))
    for row in space.sample_genotypes(np.random.default_rng(0), 12):
        arch = space.decode(row)
        inputs, extracted = make_inputs(arch.ends), supernet.extract(arch)
        difference = (supernet.view(arch)(inputs) - extracted(inputs)).abs().max()
        assert difference <= 1e-5
        assert (extracted.ends.embedding_proj is None) == (arch.d_model == WIDTH)
        total = sum(parameter.numel() for parameter in extracted.parameters())
        assert total == arch_cost(arch, num_params)


@pytest.mark.parametrize("d_models", [(10, 6, 4), (6, 4)])
def test_importance_ordering_keeps_the_largest_network(d_models: tuple[int, ...]) -> None:
    for norm in ("layernorm", "prepbn"):
        family = replace(BERT, embedding_norm=norm, final_norm=norm)
        supernet = Supernet(space_of(family, d_models), torch.Generator().manual_seed(0))
        largest = supernet.space.largest()
        inputs = make_inputs(largest.ends)
        before = supernet.view(largest)(inputs)
        order_by_importance(supernet, [(inputs, inputs)], lambda out, _: out.square().sum())
        torch.testing.assert_close(supernet.view(largest)(inputs), before, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    arch = Arch(10, 4, 0 if family.kind == "vit" else VOCAB, (LAYER,), family)
    network = Subnet(arch).reset(torch.Generator().manual_seed(0)).eval().pack()
    network.save(tmp_path)
    loaded = Subnet.load(tmp_path)
    assert loaded.arch == arch
    inputs = make_inputs(arch.ends)
    torch.testing.assert_close(loaded(inputs), network(inputs), rtol=0, atol=0)


class TestRewrites:
    @staticmethod
    def network(family: Family, d_model: int = 10) -> Subnet:
        arch = Arch(d_model, 4, 0 if family.kind == "vit" else VOCAB, (LAYER,), family)
        subnet = Subnet(arch).reset(torch.Generator().manual_seed(0)).double()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for tensor in subnet.state_dict().values():
                if tensor.ndim == 1:
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.copy_(noise + 0.5)
        return subnet.eval()

    @torch.no_grad()
    @pytest.mark.parametrize("d_model", [WIDTH, 10])
    @pytest.mark.parametrize("norm", ["prepbn", "unified_norm"])
    def test_a_foldable_norm_goes_into_the_map(self, norm: str, d_model: int) -> None:
        subnet = self.network(replace(BERT, embedding_norm=norm), d_model)
        inputs = make_inputs(subnet.arch.ends)
        expected = subnet(inputs)
        fold_norms(subnet)
        torch.testing.assert_close(subnet(inputs), expected)
        folded = isinstance(subnet.ends.embedding_norm, nn.Identity)
        assert folded == (d_model != WIDTH)

    @torch.no_grad()
    @pytest.mark.parametrize("embedding_norm", ["none", "layernorm"])
    def test_centring(self, embedding_norm: str) -> None:
        family = replace(BERT, embedding_norm=embedding_norm, final_norm="layernorm")
        subnet = self.network(family)
        inputs = make_inputs(subnet.arch.ends)
        expected = subnet(inputs)
        rewrite(subnet, "layernorm_to_rmsnorm")
        torch.testing.assert_close(subnet(inputs), expected)
        assert subnet.ends.embed(inputs).mean(dim=-1).abs().max() < 1e-12

    def test_centring_is_refused(self) -> None:
        family = replace(BERT, final_norm="layernorm")
        with pytest.raises(UserError, match="nothing linear follows embedding_norm='layernorm'"):
            rewrite(self.network(family, WIDTH), "layernorm_to_rmsnorm")
        with pytest.raises(UserError, match="the final norm is 'none', not 'layernorm'"):
            rewrite(self.network(BERT), "layernorm_to_rmsnorm")


class TestFamily:
    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ({"embedding_size": -1}, "embedding_size=-1 must be a whole number of at least 0"),
            ({"embedding_size": 2.0}, "embedding_size=2.0 must be a whole number"),
            ({"embedding_norm": "laynorm"}, "embedding_norm 'laynorm': did you mean 'layernorm'"),
            ({"final_norm": "non"}, "final_norm 'non': did you mean 'none'"),
        ],
    )
    def test_mistakes(self, values: dict[str, Any], sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            Family.from_dict(values)

    def test_names(self) -> None:
        assert Family.from_dict(BERT.to_dict()) == BERT
        key = EndsSpec(10, VOCAB, BERT).key
        assert key.endswith("/final_normnone/embedding_size6/embedding_normlayernorm")
