from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError
from searchspace.linear import Linear, project
from searchspace.precisions import PRECISIONS
from searchspace.subnet import Subnet, weight_bytes

NAMES = sorted(PRECISIONS)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(precision: str) -> Linear:
    linear = Linear(32, 16, precision)
    linear.reset(torch.Generator().manual_seed(0))
    return linear


def test_fp32_is_a_plain_linear_map_before_and_after_packing() -> None:
    linear, x = make("fp32"), draw(2, 3, 32)
    assert [name for name, _ in linear.named_parameters()] == ["weight"]
    for _ in range(2):
        assert torch.equal(linear(x), F.linear(x, linear.weight))
        linear.pack()
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.packed


def test_reset_has_the_announced_spread() -> None:
    linear = Linear(400, 300)
    linear.reset(torch.Generator().manual_seed(0), gain=0.5)
    assert linear.weight.std().item() == pytest.approx(0.5 / 20, rel=0.02)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown precision 'int5': did you mean 'int[48]'\?"):
        Linear(2, 2, "int5")


@pytest.mark.parametrize("name", NAMES)
def test_packing_twice_changes_nothing(name: str) -> None:
    linear = make(name)
    linear.pack()
    first = {key: value.clone() for key, value in linear.state_dict().items()}
    linear.pack()
    assert linear.packed == (name != "fp32")
    assert list(linear.parameters()) == [] or name == "fp32"
    for key, value in linear.state_dict().items():
        assert torch.equal(value, first[key])


@pytest.mark.parametrize("name", NAMES)
class TestBias:
    def test_none_at_first(self, name: str) -> None:
        linear = make(name)
        assert linear.bias is None
        assert list(linear.state_dict()) == ["weight"]

    def test_it_is_added_and_adds_up(self, name: str) -> None:
        linear, x, bias = make(name), draw(2, 3, 32), draw(16, seed=4)
        plain = linear(x)
        linear.add_bias(bias)
        torch.testing.assert_close(linear(x), plain + bias)
        linear.add_bias(bias)
        torch.testing.assert_close(linear(x), plain + 2 * bias)
        for shared in project(x, linear, linear):
            torch.testing.assert_close(shared, plain + 2 * bias)
        assert torch.equal(bias, draw(16, seed=4))

    def test_packed_before_or_after(self, name: str) -> None:
        before, after, x, bias = make(name), make(name), draw(2, 3, 32), draw(16, seed=4)
        before.pack()
        plain = before(x)
        before.add_bias(bias)
        after.add_bias(bias)
        after.pack()
        for linear in (before, after):
            torch.testing.assert_close(linear(x), plain + bias)
            assert linear.bias is not None and linear.bias.dtype == torch.float32
            assert "bias" in linear.state_dict()
        (shared,) = project(x, after)
        assert torch.equal(shared, after(x))

    def test_float64_and_autocast(self, name: str) -> None:
        linear, x = make(name).double(), draw(3, 32).double()
        plain = linear(x)
        linear.add_bias(draw(16, seed=4))
        torch.testing.assert_close(linear(x), plain + draw(16, seed=4).double())
        linear.float()
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(x.float())
        torch.testing.assert_close(out.double(), linear(x.float()).double(), rtol=0.05, atol=0.05)


def test_hooks_see_maps_that_share_an_input() -> None:
    for name in NAMES:
        linear, calls = make(name), []
        linear.register_forward_hook(lambda *args, calls=calls: calls.append(args[2].shape))
        project(draw(4, 32), linear)
        assert calls == [(4, 16)]


def subnet_in(precision: str, norm: str = "rmsnorm") -> Subnet:
    """Odd sizes: three heads of 10 make 30 columns, the FFN has 17."""
    layer = LayerArch(
        mixer="softmax",
        num_heads=3,
        num_kv_heads=1,
        mixer_precision=precision,
        ffn="gelu",
        intermediate_size=17,
        ffn_precision=precision,
        norm=norm,
    )
    arch = Arch(d_model=32, head_dim=10, vocab_size=7, layers=(layer, layer))
    return Subnet(arch).reset(torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("name", NAMES)
class TestCheckpoints:
    def test_a_round_trip_gives_the_same_network(self, name: str, tmp_path: Path) -> None:
        subnet, tokens = subnet_in(name), torch.arange(7)[None]
        announced = subnet.weight_bytes()
        subnet.pack()
        expected = subnet(tokens)
        subnet.save(tmp_path)
        loaded = Subnet.load(tmp_path)
        assert torch.equal(loaded(tokens), expected)
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
        stored = sum(t.numel() * t.element_size() for t in loaded.state_dict().values())
        assert stored == announced == subnet.weight_bytes() == loaded.weight_bytes()

    def test_folded_norms_and_their_biases_come_back(self, name: str, tmp_path: Path) -> None:
        subnet, tokens = subnet_in(name, norm="unified_norm"), torch.arange(7)[None]
        announced, trained = subnet.weight_bytes(), subnet(tokens)
        expected = subnet.pack()(tokens)
        torch.testing.assert_close(expected, trained, rtol=0.05, atol=0.05)
        assert any(key.endswith("_proj.bias") for key in subnet.state_dict()) or name != "fp32"
        subnet.save(tmp_path)
        loaded = Subnet.load(tmp_path)
        assert torch.equal(loaded(tokens), expected)
        assert loaded.weight_bytes() == announced

    def test_bytes_are_counted_without_changing_the_module(self, name: str) -> None:
        subnet, tokens = subnet_in(name), torch.arange(7)[None]
        expected, names = subnet(tokens), list(subnet.state_dict())
        with torch.device("meta"):
            empty = Subnet(subnet.arch)
        for block, twin in zip(subnet.blocks.values(), empty.blocks.values(), strict=True):
            assert weight_bytes(block) == weight_bytes(twin)
        assert list(subnet.state_dict()) == names
        assert all(isinstance(p, nn.Parameter) and not p.is_meta for p in subnet.parameters())
        assert torch.equal(subnet(tokens), expected)


def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path) -> None:
    subnet = subnet_in("int4").pack()
    subnet.save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("int4", "ternary"))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        Subnet.load(tmp_path)
