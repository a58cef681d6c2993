"""Embedding, pooling and head against naive loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from searchspace.arch import Arch, LayerArch
from searchspace.ends import Ends, example_inputs
from searchspace.errors import UserError
from searchspace.family import DECODER, Family
from searchspace.specs import EndsSpec
from searchspace.sub_blocks import param_axes
from searchspace.subnet import Subnet

D_MODEL, VOCAB, PAD = 6, 11, 0
MEAN = Family("encoder", num_classes=4, pad_token=PAD)
POSITION_WISE = LayerArch(ffn="gelu", intermediate_size=10)


def make_ends(family: Family) -> Ends:
    ends = Ends(EndsSpec(D_MODEL, VOCAB, family))
    ends.reset(torch.Generator().manual_seed(0))
    return ends


def make_tokens(batch: int = 2, tokens: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, VOCAB, (batch, tokens), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    ("image_size", "patch_size", "channels"), [(8, 2, 1), (6, 3, 3), (4, 1, 2)]
)
def test_patches_against_a_loop(image_size: int, patch_size: int, channels: int) -> None:
    family = Family(
        "vit", num_classes=3, image_size=image_size, patch_size=patch_size, channels=channels
    )
    ends = make_ends(family)
    images = example_inputs(ends.spec, 2, 0, torch.Generator().manual_seed(1))
    assert images.shape == (2, channels, image_size, image_size)
    rows = []
    for image in images:
        for top in range(0, image_size, patch_size):
            for left in range(0, image_size, patch_size):
                patch = image[:, top : top + patch_size, left : left + patch_size]
                rows.append(ends.patch_proj.weight @ patch.reshape(-1))
    expected = torch.stack(rows).reshape(2, -1, D_MODEL)
    torch.testing.assert_close(ends.embed(images), expected)


@torch.no_grad()
def test_mean_pooling_leaves_padding_out() -> None:
    ends, tokens = make_ends(MEAN), make_tokens()
    tokens[0, 4:], tokens[1, 2] = PAD, PAD
    x = torch.randn(2, 7, D_MODEL, generator=torch.Generator().manual_seed(3))
    expected = torch.stack(
        [ends.norm(x[0, :4]).mean(0), ends.norm(x[1, [0, 1, 3, 4, 5, 6]]).mean(0)]
    )
    torch.testing.assert_close(ends.hidden(x, tokens), expected)
    # Without a pad token every token counts; with nothing but padding the result is finite.
    every = make_ends(Family("encoder", num_classes=4))
    torch.testing.assert_close(every.hidden(x, tokens), every.norm(x).mean(dim=1))
    assert torch.isfinite(ends.logits(x, torch.full_like(tokens, PAD))).all()


@torch.no_grad()
def test_pad_embeddings_change_nothing_in_a_position_wise_network() -> None:
    arch = Arch(D_MODEL, 2, VOCAB, (POSITION_WISE,), MEAN)
    network = Subnet(arch).reset(torch.Generator().manual_seed(0))
    tokens = make_tokens()
    short = network(tokens[:, :4])
    tokens[:, 4:] = PAD
    for value in (0.0, 1.0, 1e6):
        network.ends.embedding[PAD] = value
        torch.testing.assert_close(network(tokens), short)
    network.ends.embedding[3] += 1.0
    assert not torch.allclose(network(torch.full_like(tokens, 3)), short)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder", "vit"])
def test_the_class_token_stands_first_and_is_read(kind: str) -> None:
    sizes = {"image_size": 4, "patch_size": 2, "channels": 1} if kind == "vit" else {}
    ends = make_ends(Family(kind, num_classes=4, pooling="class_token", **sizes))
    inputs = example_inputs(ends.spec, 3, 5, torch.Generator().manual_seed(1))
    x = ends.embed(inputs)
    assert x.shape == (3, 1 + (4 if kind == "vit" else 5), D_MODEL)
    torch.testing.assert_close(x[:, 0], ends.class_token.expand(3, -1))
    changed = x.clone()
    changed[:, 1:] += 1.0
    torch.testing.assert_close(ends.logits(x, inputs), ends.logits(changed, inputs))
    expected = ends.norm(x[:, 0]) @ ends.head.weight.T
    torch.testing.assert_close(ends.logits(x, inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_learned_positions(pooling: str) -> None:
    family = Family(
        "encoder", num_classes=4, pooling=pooling, embedding_position="learned", max_tokens=7
    )
    ends, tokens = make_ends(family), make_tokens()
    x = ends.embed(tokens)[:, family.num_extra_tokens :]
    for t in range(7):
        torch.testing.assert_close(x[:, t], ends.embedding[tokens[:, t]] + ends.positions[t])
    with pytest.raises(UserError, match=r"8 tokens were given, .* max_tokens=7; give fewer"):
        ends.embed(make_tokens(tokens=8))


@torch.no_grad()
def test_decoding_goes_on_at_the_right_position() -> None:
    family = Family(embedding_position="learned", max_tokens=7)
    ends, tokens = make_ends(family), make_tokens()
    torch.testing.assert_close(ends.embed(tokens[:, 3:], start=3), ends.embed(tokens)[:, 3:])
    with pytest.raises(UserError, match="8 tokens were given"):
        ends.embed(tokens[:, :1], start=7)
    network = Subnet(Arch(D_MODEL, 2, VOCAB, (POSITION_WISE,), family))
    network.reset(torch.Generator().manual_seed(0))
    state = network.init_state(2, 7)
    parts = [network(part, state) for part in tokens.split([3, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), network(tokens))
    assert state[-1].length == 7


@torch.no_grad()
def test_a_decoder_predicts_at_every_token() -> None:
    ends, tokens = make_ends(DECODER), make_tokens()
    expected = ends.norm(ends.embedding[tokens]) @ ends.head.weight.T
    torch.testing.assert_close(ends(tokens), expected)
    # Small logits at first: the loss starts near log(V).
    assert ends(tokens).std() < 0.2


@pytest.mark.parametrize(
    "family",
    [
        DECODER,
        MEAN,
        Family("encoder", num_classes=4, pooling="class_token", embedding_position="learned"),
        Family("vit", 4, "class_token", "learned", image_size=4, patch_size=2, channels=3),
    ],
    ids=lambda family: family.kind + "/" + family.pooling,
)
def test_axes_and_reset_cover_every_parameter(family: Family) -> None:
    ends = Ends(EndsSpec(D_MODEL, VOCAB, family))
    axes = param_axes(ends.spec)
    shapes = {name: p.shape for name, p in ends.named_parameters()}
    assert set(axes) == set(shapes)
    sizes = {
        "d_model": D_MODEL,
        "vocab_size": VOCAB,
        "num_classes": family.num_classes,
        "max_tokens": family.max_tokens,
        "patch_values": family.channels * family.patch_size**2,
        "one": 1,
    }
    for name, shape in shapes.items():
        assert [sizes[axis] for axis in axes[name]] == list(shape)
    with torch.no_grad():
        for name, parameter in ends.named_parameters():
            if not name.startswith("norm."):
                parameter.fill_(torch.nan)
    ends.reset(torch.Generator().manual_seed(0))
    assert all(torch.isfinite(p).all() for p in ends.parameters())
