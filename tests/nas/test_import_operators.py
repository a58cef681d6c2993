"""What checkpoints need of operators: biases, tied and pooled heads, norms, padding left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from searchspace.arch import Arch, LayerArch
from searchspace.cost import num_params, weight_bytes
from searchspace.ends import Ends
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.ffn import FFNS
from searchspace.importance import order_by_importance
from searchspace.linear import Linear
from searchspace.mixers.base import SharedKV
from searchspace.norms import NORMS
from searchspace.rewrites import fold_norms, rewrite
from searchspace.space import SearchSpace
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec
from searchspace.sub_blocks import build_sub_block, param_axes, reset_sub_block
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

D_MODEL, VOCAB, PAD = 16, 23, 0
TIED = Family(tied_head=True)
POOLED = Family(
    "encoder", num_classes=3, pooling="class_token", embedding_position="learned", max_tokens=20,
    pad_token=PAD, final_norm="none", embedding_norm="layernorm_e12", pooler="tanh",
    head_bias=True, mask_padding=True,
)  # fmt: skip
BIASED = LayerArch(
    mixer="softmax", num_heads=4, num_kv_heads=2, position="rope", ffn="gelu_stack",
    intermediate_size=24, norm="layernorm_e12", mixer_options=(("bias", "all"),),
    ffn_options=(("bias", "all"),),
)  # fmt: skip


def network(family: Family, layer: LayerArch = BIASED) -> Subnet:
    generator = torch.Generator().manual_seed(0)
    subnet = Subnet(Arch(D_MODEL, 4, VOCAB, (layer,) * 2, family)).reset(generator)
    with torch.no_grad():
        for param in subnet.parameters():
            if param.ndim == 1:
                param.add_(0.3 * torch.randn(param.shape, generator=generator))
    return subnet.eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def test_ids_of_networks_without_the_new_options_are_what_they_were() -> None:
    plain = LayerArch("softmax", 4, 2, "rope", ffn="gelu", intermediate_size=24)
    spelt_out = replace(
        plain,
        mixer_options=(("bias", "none"), ("qk_norm", "none")),
        ffn_options=(("bias", "none"),),
    )
    assert spelt_out == plain
    assert Arch(D_MODEL, 4, VOCAB, (plain,)).to_json() == (
        '{"d_model":16,"head_dim":4,"layers":[{"ffn":"gelu","ffn_precision":"fp32",'
        '"intermediate_size":24,"mixer":"softmax","mixer_options":{},"mixer_precision":"fp32",'
        '"norm":"rmsnorm","num_heads":4,"num_kv_heads":2,"position":"rope"}],"vocab_size":23}'
    )


@torch.no_grad()
def test_a_tied_head_is_the_embedding_and_counted_once(tmp_path: Path) -> None:
    subnet, inputs = network(TIED), tokens()
    hidden = subnet.ends.hidden(subnet.features(inputs), inputs)
    torch.testing.assert_close(subnet(inputs), hidden @ subnet.ends.embedding.T)
    assert "ends.head.weight" not in dict(subnet.named_parameters())
    spec, free = EndsSpec(D_MODEL, VOCAB, TIED), EndsSpec(D_MODEL, VOCAB)
    assert num_params(free) - num_params(spec) == VOCAB * D_MODEL
    assert weight_bytes(free) - weight_bytes(spec) == 4 * VOCAB * D_MODEL
    subnet.pack().save(tmp_path)
    loaded = Subnet.load(tmp_path)
    assert torch.equal(loaded(inputs), subnet(inputs))
    loaded.ends.embedding.zero_()
    assert not loaded(inputs).any()


def test_both_uses_of_a_tied_embedding_are_trained() -> None:
    space = SearchSpace(
        "tied", VOCAB, (16, 8), 4, 1, {"softmax": {}}, ((4, 4),), (24,), family=TIED
    )
    supernet, inputs = Supernet(space, torch.Generator().manual_seed(0)), tokens()
    supernet.start_step()
    logits = supernet.view(space.uniform(d_model=8), train=True)(inputs)
    F.cross_entropy(logits.flatten(0, 1), inputs.flatten()).backward()
    supernet.publish_gradients()
    grad = supernet.params["ends.embedding"].grad
    absent = [token for token in range(VOCAB) if token not in inputs]
    assert grad is not None and absent and bool(grad[absent, :8].any(dim=1).all())
    assert not grad[:, 8:].any()


@torch.no_grad()
def test_the_pooled_head_against_its_formula() -> None:
    subnet, inputs = network(POOLED), tokens()
    ends, x = subnet.ends, subnet.features(inputs)
    assert ends.pooler is not None and isinstance(ends.head, Linear) and ends.head.bias is not None
    pooled = (x[:, 0] @ ends.pooler.weight.T + ends.pooler.bias).tanh()
    expected = pooled @ ends.head.weight.T + ends.head.bias
    torch.testing.assert_close(subnet(inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("position", ["nope", "rope", "alibi"])
@pytest.mark.parametrize("options", [{}, {"qk": "collapsed"}, {"vo": "identity"}])
def test_padding_that_is_left_out_changes_nothing(options: dict[str, str], position: str) -> None:
    layer = replace(BIASED, position=position, mixer_options=tuple(options.items()))
    subnet, inputs = network(POOLED, layer), tokens(3, 9)
    padded = F.pad(inputs, (0, 5), value=PAD)
    torch.testing.assert_close(subnet(padded), subnet(inputs))
    seeing = Subnet(replace(subnet.arch, family=replace(POOLED, mask_padding=False)))
    seeing.load_state_dict(subnet.state_dict())
    assert (seeing(padded) - subnet(padded)).abs().max() > 1e-3
    assert torch.isfinite(subnet(torch.full_like(inputs, PAD))).all()
    without_class = replace(POOLED, pooling="mean")
    assert torch.isfinite(network(without_class, layer)(torch.full_like(inputs, PAD))).all()


@torch.no_grad()
def test_attention_weights_of_padding_are_zero() -> None:
    subnet, inputs = network(POOLED), tokens(1, 6)
    inputs[0, 4:] = PAD
    shared = SharedKV(visible_BS=subnet.ends.visible(inputs))
    block = subnet.blocks["layer0_mixer"]
    probs = block.op.attention_probs(subnet.ends.embed(inputs), shared)
    assert not probs[..., 5:].any() and torch.allclose(probs.sum(-1), torch.ones(1))


@torch.no_grad()
@pytest.mark.parametrize("norm", [name for name, norm in NORMS.items() if norm.foldable])
def test_folding_norms_into_maps_that_have_a_bias(norm: str) -> None:
    layer = replace(BIASED, norm=norm)
    family = replace(POOLED, final_norm=norm, mask_padding=False)
    for subnet in (network(family, layer), network(replace(TIED, final_norm=norm), layer)):
        inputs, shared_bias = tokens(), subnet.blocks["layer0_mixer"].op.q_proj.bias
        before, expected = shared_bias.clone(), subnet(inputs)
        fold_norms(subnet)
        torch.testing.assert_close(subnet(inputs), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(shared_bias, before)


@torch.no_grad()
def test_layernorm_to_rmsnorm_keeps_what_stands_under_the_root() -> None:
    layer = replace(BIASED, norm="layernorm_e12")
    subnet, inputs = network(Family(final_norm="layernorm_e12"), layer), tokens()
    expected = subnet(inputs)
    rewrite(subnet, "layernorm_to_rmsnorm")
    torch.testing.assert_close(subnet(inputs), expected, rtol=1e-4, atol=1e-5)
    assert subnet.ends.norm.eps == 1e-12
    with pytest.raises(UserError, match="tied_head=true"):
        rewrite(network(replace(TIED, final_norm="layernorm_e12"), layer), "layernorm_to_rmsnorm")


@torch.no_grad()
def test_normalised_queries_and_keys_against_the_formula() -> None:
    spec = MixerSpec(D_MODEL, "softmax", 4, 2, 4, options=(("qk_norm", "rmsnorm"),), causal=False)
    block = build_sub_block(spec)
    reset_sub_block(block, torch.Generator().manual_seed(0), 1)
    op, x = block.op, torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(1))
    op.q_norm.mul_(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    out = []
    for head in range(4):
        rows, kv_rows = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        q, k = x @ op.q_proj.weight[rows].T, x @ op.k_proj.weight[kv_rows].T
        q = q / (q.square().mean(-1, keepdim=True) + 1e-5).sqrt() * op.q_norm
        k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt() * op.k_norm
        out.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ (x @ op.v_proj.weight[kv_rows].T))
    torch.testing.assert_close(op(x), torch.cat(out, -1) @ op.o_proj.weight.T)


@pytest.mark.parametrize("ffn", FFNS)
def test_biases_of_ffns_have_the_axis_of_their_maps_outputs(ffn: str) -> None:
    axes = param_axes(FFNSpec(D_MODEL, ffn, 24, options=(("bias", "all"),)))
    linears = [name for name in axes if name.endswith("_proj.weight")]
    assert linears
    for name in linears:
        assert axes[name.removesuffix("weight") + "bias"] == axes[name][:1]


def test_importance_moves_biases_and_pooler_along() -> None:
    layer = replace(BIASED, norm_placement="post", position="nope", num_kv_heads=4)
    space = SearchSpace(
        "pooled", VOCAB, (16, 8), 4, 2, {"softmax": {"bias": ("all",)}}, ((4, 4), (2, 2)), (24, 12),
        position=("nope",), ffn=("gelu_stack",), ffn_options={"gelu_stack": {"bias": ("all",)}},
        norm=("layernorm_e12",), norm_placement=("post",), family=POOLED,
    )  # fmt: skip
    assert space.largest().layers[0] == layer
    supernet, inputs = Supernet(space, torch.Generator().manual_seed(0)), tokens(4)
    with torch.no_grad():
        for param in supernet.params.values():
            param.add_(0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(5)))
        expected = supernet.view(space.largest())(inputs)
    bias = supernet.params["blocks.layer0_ffn.op.up_proj.bias"].detach().clone()
    order_by_importance(supernet, [(inputs, torch.tensor([0, 1, 2, 1]))], F.cross_entropy)
    moved = supernet.params["blocks.layer0_ffn.op.up_proj.bias"].detach()
    assert not torch.equal(moved, bias) and torch.equal(moved.sort().values, bias.sort().values)
    with torch.no_grad():
        torch.testing.assert_close(supernet.view(space.largest())(inputs), expected)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "encoder", "num_classes": 2, "tied_head": True},
        {"tied_head": True, "embedding_size": 8},
        {"tied_head": 1},
        {"pooler": "tanh"},
        {"head_bias": True},
        {"mask_padding": True},
        {"kind": "encoder", "num_classes": 2, "mask_padding": True},
        {"kind": "encoder", "num_classes": 2, "pooler": "relu"},
    ],
)
def test_heads_that_a_family_cannot_have(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Family(**values)  # type: ignore[arg-type]


def test_axes_of_the_ends_are_those_of_their_parameters() -> None:
    for family in (TIED, POOLED):
        spec = EndsSpec(D_MODEL, VOCAB, family)
        assert {name for name, _ in Ends(spec).named_parameters()} == set(param_axes(spec))
