from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.family import Family
from searchspace.ffn import FFNS
from searchspace.linear import Linear
from searchspace.mixers import MIXERS
from searchspace.norms import Affine, Norm, RMSNorm
from searchspace.rewrites import REWRITES, fold_norms, layernorm_to_rmsnorm
from searchspace.specs import PLACEMENTS
from searchspace.subnet import Subnet

FOLDABLE = ("prepbn", "unified_norm")
ENCODER = Family("encoder", num_classes=3, max_tokens=16, embedding_position="learned")
VIT = Family(
    "vit", num_classes=3, image_size=6, channels=2, patch_size=2, embedding_position="learned"
)
LAYER = LayerArch(
    "softmax", num_heads=4, num_kv_heads=2, ffn="swiglu", intermediate_size=21, norm="prepbn"
)
D_MODEL = 20


def make_arch(*layers: LayerArch, family: Family | None = None) -> Arch:
    if family is None:
        mixers = [MIXERS[layer.mixer] for layer in layers if layer.mixer in MIXERS]
        causal = all("causal" in mixer.directions for mixer in mixers)
        family = Family() if causal else ENCODER
    vocab_size = 0 if family.kind == "vit" else 17
    return Arch(D_MODEL, 6, vocab_size, layers, family)


def make_subnet(arch: Arch, dtype: torch.dtype = torch.float64) -> Subnet:
    """Return a network for inference whose norms have uneven parameters and statistics."""
    generator = torch.Generator().manual_seed(0)
    subnet = Subnet(arch).reset(generator)
    with torch.no_grad():
        for norm in subnet.modules():
            if isinstance(norm, Norm):
                for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
                    value.copy_(0.5 + torch.rand(value.shape, generator=generator))
                    if name in ("bias", "running_mean"):
                        value.sub_(1.0)
    return subnet.to(dtype).eval()


def run(subnet: Subnet, state: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if subnet.arch.family.kind == "vit":
        inputs = torch.randn(3, 2, 6, 6, generator=generator).to(subnet.ends.head.weight.dtype)
    else:
        inputs = torch.randint(17, (3, 13), generator=generator)
    with torch.no_grad():
        if not state:
            return subnet(inputs)
        states = subnet.init_state(3, 16)
        return torch.cat([subnet(part, states) for part in inputs.split([5, 1, 7], dim=1)], dim=1)


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt()).item()


def norms_of(subnet: Subnet) -> dict[str, nn.Module]:
    last = ("norm", "norm_out")
    return {n: m for n, m in subnet.named_modules() if n.startswith("blocks") and n.endswith(last)}


def with_every_placement(layer: LayerArch) -> list[LayerArch]:
    return [replace(layer, norm_placement=placement) for placement in PLACEMENTS]


class TestFoldNorms:
    @pytest.mark.parametrize("norm", FOLDABLE)
    @pytest.mark.parametrize("mixer", MIXERS)
    def test_same_function_for_every_mixer(self, mixer: str, norm: str) -> None:
        layer = replace(LAYER, mixer=mixer, norm=norm, ffn="none", intermediate_size=0)
        subnet = make_subnet(make_arch(*with_every_placement(layer)))
        expected = run(subnet)
        fold_norms(subnet)
        assert relative(run(subnet), expected) < 1e-12
        assert not any(isinstance(module, Norm) for module in subnet.blocks.modules())

    @pytest.mark.parametrize("ffn", FFNS)
    def test_same_function_for_every_ffn(self, ffn: str) -> None:
        layer = LayerArch(ffn=ffn, intermediate_size=21, norm="unified_norm")
        subnet = make_subnet(make_arch(*with_every_placement(layer)))
        expected = run(subnet)
        fold_norms(subnet)
        assert relative(run(subnet), expected) < 1e-12

    def test_with_convolutions_and_a_state(self) -> None:
        layer = replace(LAYER, mixer_options=(("qkv_dconv", 3),))
        subnet = make_subnet(make_arch(*with_every_placement(layer)), torch.float32)
        expected = run(subnet)
        fold_norms(subnet)
        assert relative(run(subnet, state=True), expected) < 1e-5

    def test_plain_maps_leave_nothing_of_the_norm(self) -> None:
        subnet = make_subnet(make_arch(*with_every_placement(LAYER)))
        fold_norms(subnet)
        for name, module in norms_of(subnet).items():
            kind = Affine if "layer1" in name else nn.Identity
            assert type(module) is kind, name

    def test_quantised_maps_keep_their_grid(self) -> None:
        layer = replace(LAYER, mixer_precision="int8", norm_placement="peri")
        subnet = make_subnet(make_arch(layer), torch.float32)
        expected = run(subnet)
        before = {k: v.clone() for k, v in subnet.blocks["layer0_mixer"].op.state_dict().items()}
        fold_norms(subnet)
        for name, value in subnet.blocks["layer0_mixer"].op.state_dict().items():
            assert torch.equal(value, before[name])
        kinds = {name.split(".")[1:][0]: type(m) for name, m in norms_of(subnet).items()}
        assert kinds == {"layer0_mixer": Affine, "layer0_ffn": nn.Identity}
        # A rounding error of 1e-7 can move an activation to the next step of its grid.
        assert relative(run(subnet), expected) < 5e-3

    @pytest.mark.parametrize("kind", ["decoder", "encoder", "class_token", "vit"])
    def test_final_norm_goes_into_the_head(self, kind: str) -> None:
        family = {
            "decoder": Family(),
            "encoder": replace(ENCODER, pad_token=3),
            "class_token": replace(ENCODER, pooling="class_token"),
            "vit": VIT,
        }[kind]
        subnet = make_subnet(make_arch(LAYER, family=replace(family, final_norm="prepbn")))
        expected = run(subnet)
        fold_norms(subnet)
        assert type(subnet.ends.norm) is nn.Identity
        assert relative(run(subnet), expected) < 1e-12

    def test_other_norms_stay(self) -> None:
        subnet = make_subnet(make_arch(replace(LAYER, norm="layernorm")))
        before = copy.deepcopy(subnet)
        fold_norms(subnet)
        assert [type(m) for m in subnet.modules()] == [type(m) for m in before.modules()]
        assert torch.equal(run(subnet), run(before))

    def test_twice_is_once(self) -> None:
        subnet = make_subnet(make_arch(*with_every_placement(LAYER)))
        fold_norms(subnet)
        expected = {name: value.clone() for name, value in subnet.state_dict().items()}
        fold_norms(subnet)
        assert subnet.state_dict().keys() == expected.keys()
        for name, value in subnet.state_dict().items():
            assert torch.equal(value, expected[name])

    def test_unfinished_annealing_is_refused(self) -> None:
        subnet = make_subnet(make_arch(LAYER))
        subnet.blocks["layer0_ffn"].norm.blend = 0.5
        with pytest.raises(UserError, match=r"blend=0\.5"):
            fold_norms(subnet)

    def test_old_tensors_are_not_written_into(self) -> None:
        subnet = make_subnet(make_arch(*with_every_placement(LAYER)))
        old = {name: (value, value.clone()) for name, value in subnet.state_dict().items()}
        fold_norms(subnet)
        assert all(torch.equal(value, kept) for value, kept in old.values())


class TestLayernormToRmsnorm:
    def arch(self, family: Family, **changes: Any) -> Arch:
        layer = replace(LAYER, norm="layernorm", **changes)
        return make_arch(layer, replace(layer, ffn="gelu"), family=family)

    @pytest.mark.parametrize(
        "family",
        [
            Family(embedding_position="learned", max_tokens=16),
            replace(ENCODER, pooling="class_token"),
            replace(VIT, pooling="class_token"),
            VIT,
        ],
        ids=["decoder", "encoder", "vit_with_token", "vit"],
    )
    @pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_same_function(self, family: Family, dtype: torch.dtype, bound: float) -> None:
        subnet = make_subnet(self.arch(replace(family, final_norm="layernorm")), dtype)
        with torch.no_grad():
            # A mean and a bias that matter.
            if hasattr(subnet.ends, "embedding"):
                subnet.ends.embedding.add_(1.0)
            else:
                subnet.ends.patch_proj.add_bias(torch.linspace(-1, 2, D_MODEL, dtype=dtype))
        expected = run(subnet)
        layernorm_to_rmsnorm(subnet)
        assert relative(run(subnet), expected) < bound
        norms = [module for module in subnet.modules() if isinstance(module, Norm)]
        assert len(norms) == 5 and all(type(norm) is RMSNorm for norm in norms)

    @pytest.mark.parametrize("mixer", MIXERS)
    def test_every_mixer_is_exact_or_refused(self, mixer: str) -> None:
        arch = make_arch(replace(LAYER, mixer=mixer, norm="layernorm"))
        arch = replace(arch, family=replace(arch.family, final_norm="layernorm"))
        subnet = make_subnet(arch)
        expected, op = run(subnet), subnet.blocks["layer0_mixer"].op
        if op.input_linears() and op.output_linear() is not None:
            layernorm_to_rmsnorm(subnet)
        else:
            with pytest.raises(UserError, match=f"in layer0_mixer, {mixer!r}"):
                layernorm_to_rmsnorm(subnet)
        assert relative(run(subnet), expected) < 1e-12

    @pytest.mark.parametrize(
        "changes,final,reason",
        [
            ({"norm_placement": "post"}, "layernorm", "layer0_mixer has placement='post'"),
            ({"norm": "rmsnorm"}, "layernorm", "layer0_mixer has norm='rmsnorm'"),
            ({}, "rmsnorm", "the final norm is 'rmsnorm'"),
            ({"ffn_precision": "int8"}, "layernorm", "layer0_ffn.op.*precision='int8'"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], final: str, reason: str) -> None:
        arch = make_arch(
            replace(LAYER, **{"norm": "layernorm", **changes}), family=Family(final_norm=final)
        )
        subnet = make_subnet(arch, torch.float32)
        before = copy.deepcopy(subnet)
        with pytest.raises(UserError, match=reason):
            layernorm_to_rmsnorm(subnet)
        assert torch.equal(run(subnet), run(before))


@pytest.mark.parametrize("rewrite", ["fold_norms", *REWRITES])
def test_a_rewritten_network_is_rebuilt_on_meta(rewrite: str) -> None:
    if rewrite == "fold_norms":
        arch = make_arch(*with_every_placement(LAYER), replace(LAYER, mixer_precision="int8"))
    else:
        arch = make_arch(replace(LAYER, norm="layernorm"), family=Family(final_norm="layernorm"))
    apply = REWRITES.get(rewrite, fold_norms)
    subnet = make_subnet(arch, torch.float32)
    apply(subnet)
    with torch.device("meta"):
        rebuilt = Subnet(arch)
    apply(rebuilt)
    assert all(value.is_meta for value in rebuilt.state_dict().values())
    rebuilt.load_state_dict(subnet.state_dict(), assign=True)
    assert torch.equal(run(rebuilt.eval()), run(subnet))


def test_folded_maps_have_biases() -> None:
    subnet = make_subnet(make_arch(LAYER))
    fold_norms(subnet)
    op: Any = subnet.blocks["layer0_mixer"].op
    with_bias = [m for m in op.modules() if isinstance(m, Linear) and m.bias is not None]
    assert with_bias == op.input_linears()
