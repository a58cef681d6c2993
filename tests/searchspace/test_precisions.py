from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from searchspace.linear import Linear, project
from searchspace.precisions import PRECISIONS

NAMES = sorted(PRECISIONS)
LOW = [name for name in NAMES if name != "fp32"]
SIZES = [(1, 1), (33, 17), (64, 48), (320, 320)]  # K, N
# What is really run may round activations and results to bf16.
BF16_RMS = 5e-3


def make(precision: str, in_features: int = 64, out_features: int = 48, seed: int = 0) -> Linear:
    linear = Linear(in_features, out_features, precision)
    linear.reset(torch.Generator().manual_seed(seed))
    return linear


def packed(linear: Linear) -> Linear:
    linear = copy.deepcopy(linear)
    linear.pack()
    return linear


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", NAMES)
class TestEveryPrecision:
    def test_the_registry_tells_its_names(self, name: str) -> None:
        assert PRECISIONS[name].name == name
        assert PRECISIONS[name].bits in (2, 4, 8, 16, 32)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("tokens", [1, 50])
    def test_packed_is_close_to_simulated(
        self, name: str, size: tuple[int, int], tokens: int
    ) -> None:
        linear, x = make(name, *size), draw(2, tokens, size[0])
        simulated = linear(x)
        assert simulated.shape == (2, tokens, size[1])
        with torch.inference_mode():
            out = packed(linear)(x)
        assert out.dtype == torch.float32
        assert rms_ratio(out, simulated) < BF16_RMS

    def test_in_float64_packed_equals_simulated(self, name: str) -> None:
        linear, x = make(name, 33, 17).double(), draw(3, 33).double()
        out = packed(linear)(x)
        assert out.dtype == torch.float64
        assert rms_ratio(out, linear(x)) < 1e-6

    def test_how_far_it_is_from_full_precision(self, name: str) -> None:
        linear, x = make(name, 256, 64), draw(40, 256)
        error = rms_ratio(linear(x), F.linear(x, linear.weight))
        bounds = {"fp32": 1e-6, "bf16": 4e-3, "int8": 0.02, "int8_weight": 0.015, "int4": 0.1}
        bounds["fp8"] = 0.05  # a rounded weight times a rounded input
        assert error < bounds.get(name, 0.6)
        # The grid really is that coarse.
        assert error > bounds.get(name, 0.6) / 10 or name == "fp32"

    def test_gradients_pass_straight_through(self, name: str) -> None:
        weight = draw(5, 33).requires_grad_()
        (PRECISIONS[name].fake_weight(weight) * draw(5, 33, seed=2)).sum().backward()
        assert torch.equal(weight.grad, draw(5, 33, seed=2))
        linear, x = make(name), draw(6, 64).requires_grad_()
        linear(x).square().sum().backward()
        for grad in (linear.weight.grad, x.grad):
            assert torch.isfinite(grad).all()
            assert (grad != 0).any()

    @pytest.mark.parametrize("size", SIZES)
    def test_stored_bits(self, name: str, size: tuple[int, int]) -> None:
        in_features, out_features = size
        stored = packed(make(name, *size)).state_dict()
        bytes_per_row = -(-in_features * PRECISIONS[name].bits // 8)
        weight = stored.pop("weight")
        assert weight.numel() * weight.element_size() == out_features * bytes_per_row
        assert all(key.startswith("weight_") for key in stored)
        if name in LOW:
            groups = -(-in_features // 32)
            extra = {
                "bf16": 0,
                "fp8": 4 * out_features,
                "int8": 4 * out_features,
                "int8_weight": 2 * out_features,
                "int4": 4 * out_features * groups,
                "ternary": 4,
            }[name]
            assert sum(t.numel() * t.element_size() for t in stored.values()) == extra

    @pytest.mark.parametrize("size", SIZES)
    def test_meta_takes_the_same_form(self, name: str, size: tuple[int, int]) -> None:
        real = packed(make(name, *size)).state_dict()
        with torch.device("meta"):
            empty = packed(Linear(*size, name)).state_dict()
        assert list(empty) == list(real)
        for key, tensor in empty.items():
            assert tensor.is_meta
            assert (tensor.shape, tensor.dtype) == (real[key].shape, real[key].dtype)

    def test_a_slice_and_its_copy_are_rounded_alike(self, name: str) -> None:
        shared, x = draw(40, 96), draw(7, 33)
        view, copied = Linear(33, 17, name), Linear(33, 17, name)
        view.weight = torch.nn.Parameter(shared[:17, :33])
        assert not view.weight.is_contiguous()
        copied.weight = torch.nn.Parameter(shared[:17, :33].clone())
        assert rms_ratio(view(x), copied(x)) < 1e-6
        stored, expected = packed(view).state_dict(), packed(copied).state_dict()
        for key in expected:
            assert torch.equal(stored[key], expected[key])

    def test_under_bf16_autocast(self, name: str) -> None:
        linear, x = make(name), draw(9, 64)
        expected = linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(x)
            ready = packed(linear)(x)
        out.float().square().mean().backward()
        assert rms_ratio(out, expected) < 3e-2
        assert rms_ratio(ready, expected) < 3e-2
        assert torch.isfinite(linear.weight.grad).all()

    def test_bf16_input_gives_bf16(self, name: str) -> None:
        if name == "fp32":
            return
        linear, x = make(name), draw(9, 64)
        out = packed(linear)(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert rms_ratio(out, linear(x)) < 2e-2

    def test_a_token_does_not_depend_on_others(self, name: str) -> None:
        linear, x = packed(make(name)), draw(1, 30, 64)
        alone = linear(x[:, :1])
        x[:, 1:] *= 1e3
        assert rms_ratio(linear(x)[:, :1], alone) < BF16_RMS

    @pytest.mark.parametrize("offset", [0, 1])
    def test_memory_may_lie_anywhere(self, name: str, offset: int) -> None:
        """Inputs that are views, and stored tensors that are views into a file."""
        linear, x = packed(make(name, 96, 30)), draw(offset + 96 * 7)[offset:].view(96, 7).T
        expected = linear(x.contiguous())
        for key, tensor in linear.named_buffers():
            memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
            memory[1:] = tensor.flatten()
            setattr(linear, key, memory[1:].view(tensor.shape))
        for dtype in (torch.float32, torch.bfloat16) if linear.packed else (torch.float32,):
            assert rms_ratio(linear(x.to(dtype)), expected) < 2e-2
            alone = draw(offset + 96).to(dtype)[offset:]
            assert rms_ratio(linear(alone), linear(alone[None].float())[0]) < 2e-2

    def test_shared_inputs_give_the_same(self, name: str) -> None:
        others = [make(other, seed=3) for other in NAMES]
        x = draw(2, 5, 64)
        for maps in ([make(name), make(name, seed=2), *others], [*map(packed, others)]):
            for shared, linear in zip(project(x, *maps), maps, strict=True):
                assert torch.equal(shared, linear(x))

    def test_packing_inside_inference_mode_leaves_usable_tensors(self, name: str) -> None:
        linear, x = make(name), draw(3, 64).requires_grad_()
        with torch.inference_mode():
            linear.pack()
            linear(x)
        assert not any(t.is_inference() for t in linear.state_dict().values())
        linear(x.detach())


@pytest.mark.parametrize("name", ["int4", "ternary"])
class TestRuntimeCopies:
    """Layouts that kernels want are derived at the first call, and are nobody else's business."""

    def test_nothing_of_them_is_saved_or_copied(self, name: str) -> None:
        linear, x = packed(make(name)), draw(3, 64)
        keys = list(linear.state_dict())
        with torch.inference_mode():
            out = linear(x)
        assert linear._runtime
        assert list(linear.state_dict()) == keys
        for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert not twin._runtime
            assert torch.equal(twin(x), out)

    def test_they_follow_what_is_loaded(self, name: str) -> None:
        linear, other, x = packed(make(name)), packed(make(name, seed=5)), draw(3, 64)
        linear(x)
        for assign in (False, True):
            linear.load_state_dict(other.state_dict(), assign=assign)
            assert torch.equal(linear(x), other(x))
            other = packed(make(name, seed=6))

    def test_they_are_dropped_on_moves(self, name: str) -> None:
        linear = packed(make(name))
        linear(draw(3, 64))
        assert not linear.to("meta")._runtime

    def test_a_trace_leaves_no_fake_tensors(self, name: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        linear, x = packed(make(name)), draw(3, 64)
        with FakeTensorMode(allow_non_fake_inputs=True):
            linear(torch.zeros(3, 64))
        assert not linear._runtime
        assert torch.isfinite(linear(x)).all()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LOW), st.integers(1, 70), st.integers(1, 20), st.integers(1, 40))
def test_any_size(name: str, in_features: int, out_features: int, tokens: int) -> None:
    linear, x = make(name, in_features, out_features), draw(tokens, in_features)
    out, expected = packed(linear)(x), linear(x)
    # Relative to what went in: a single result may be near zero by cancellation.
    scale = F.linear(x.abs(), linear.weight.abs()).square().mean().sqrt()
    assert (out - expected).square().mean().sqrt() < BF16_RMS * scale
