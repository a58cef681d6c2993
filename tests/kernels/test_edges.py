"""What kernels and PyTorch's forms must agree on beyond values, and numbers out of 32 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from nas_kernels.cross_entropy import linear_cross_entropy
from nas_kernels.decode_attention import decode_attention
from nas_kernels.delta_rule import step as delta_step
from nas_kernels.dispatch import triton_available
from nas_kernels.elastic_linear import elastic_linear
from nas_kernels.int8_linear import int8_linear, quantize_activations, quantize_weight
from nas_kernels.launching import power_of_two_below, tf32_allowed
from nas_kernels.linear_attention import linear_attention
from nas_kernels.linear_attention import step as linear_step
from nas_kernels.norms import layer_norm, rms_norm
from nas_kernels.selective_scan import step as selective_step
from tests.kernels.comparison import DEVICE, assert_close, draw, far_apart

triton_only = pytest.mark.skipif(not triton_available(), reason="triton is not installed")
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=triton_only)]
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


scattered = partial(far_apart, axis=-1, apart=2**28, dtype=torch.bfloat16)


def rounded(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).bfloat16().float()


@triton_only
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_features_of_one_token_may_be_anywhere() -> None:
    q, k, v = (rounded(1, 2, 9, seed=seed) for seed in range(3))
    share, state = torch.full((1, 2), 0.5), draw(1, 2, 9, 9, seed=3)
    near, far = [state.clone() for _ in range(2)], [state.clone() for _ in range(2)]
    others: dict[str, Any] = {"implementation": "triton"}
    outs = [linear_step(q, k, v, None, near[0]), delta_step(q, k, v, share, near[1])]
    q, k, v = scattered(q), scattered(k), scattered(v)
    found = [linear_step(q, k, v, None, far[0], **others)]
    found += [delta_step(q, k, v, share, far[1], **others)]
    for out, right in zip(found, outs, strict=True):
        assert_close(out, right, 8e-3)
    for out, right in zip(far, near, strict=True):
        assert_close(out, right)


@triton_only
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_channels_of_one_token_may_be_anywhere() -> None:
    x, delta, write, read = (rounded(1, 9, seed=seed) for seed in range(4))
    delta, a, state = delta.abs(), -draw(9, 9, seed=4).abs(), draw(1, 9, 9, seed=5)
    other = state.clone()
    right = selective_step(x, delta, a, write, read, state)
    far = scattered(x), scattered(delta), a, scattered(write), scattered(read)
    assert_close(selective_step(*far, other, implementation="triton"), right)
    assert_close(other, state)


@both
def test_norms_keep_a_dtype_under_autocast(implementation: str) -> None:
    x, weight = draw(3, 8, dtype=torch.bfloat16), draw(8)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for given in (x, x.float()):
            for scale in (weight, weight.bfloat16()):
                assert rms_norm(given, scale, implementation=implementation).dtype == given.dtype
                assert (
                    layer_norm(given, scale, scale, implementation=implementation).dtype
                    == given.dtype
                )


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_maps_of_two_dtypes(implementation: str, autocast: bool) -> None:
    x, weight, bias = draw(3, 8, dtype=torch.bfloat16), draw(5, 8, seed=1), draw(5, seed=2)
    expected = F.silu(F.linear(x.double(), weight.double(), bias.double()))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        found = elastic_linear(x, weight, bias, activation="silu", implementation=implementation)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert_close(found, expected, 2e-2 if autocast else None)


@both
def test_one_token_under_autocast(implementation: str) -> None:
    q, k, v = (draw(1, 2, 2, 8, seed=seed) for seed in range(3))
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        many, _ = linear_attention(q, k, v, implementation=implementation)
        one, _ = linear_attention(*(x[:, :, :1] for x in (q, k, v)), implementation=implementation)
    assert one.dtype == many.dtype == torch.bfloat16
    assert_close(one, many[:, :, :1].double(), 2e-2)


def test_half_gradients_of_many_rows_do_not_vanish() -> None:
    rows, classes = 2**15, 20
    x, weight = (torch.zeros(n, 4, dtype=torch.float16) for n in (rows, classes))
    bias = torch.zeros(classes, dtype=torch.float16)
    bias[-1] = -8.0
    targets = torch.arange(rows) % (classes - 1)
    loss = linear_cross_entropy(x, weight, targets, bias.requires_grad_())
    (grad,) = torch.autograd.grad(loss * 2.0**10, bias)
    share = bias.detach().double().softmax(0)[-1]
    assert_close(grad[-1], share * 2.0**10, 1e-2)


def test_a_bias_that_is_trained_is_not_forgotten() -> None:
    x, (weight, scale) = quantize_activations(draw(3, 8)), quantize_weight(draw(4, 8))
    bias = draw(4).requires_grad_()
    assert int8_linear(x, weight, scale, bias).requires_grad
    if triton_available():
        with pytest.raises(RuntimeError, match="it has no gradient"):
            int8_linear(x, weight, scale, bias, implementation="triton")


@triton_only
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_is_cut_to_tf32_only_where_allowed(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nas_kernels.block_attention.launch import Blocks, _arguments
    from nas_kernels.block_attention.pattern import Pattern
    from nas_kernels.decode_attention import triton_kernel

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        wanted = "tf32x3" if precision == "highest" else "tf32"
        assert tf32_allowed() == (precision == "high")
        q = draw(1, 1, 1, 16)
        arguments = _arguments(q, q, q, Pattern(), 1.0, Blocks(16, 4, 2))
        assert arguments[2]["PRECISION"] == wanted
        kernel = Recorder()
        monkeypatch.setattr(triton_kernel, "_part_kernel", kernel)
        decode_attention(q, q, q, implementation="triton")
        assert kernel.given["PRECISION"] == wanted
    finally:
        torch.set_float32_matmul_precision(before)


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __getitem__(self, grid: Any) -> Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.given = kwargs


def test_parts_are_powers_of_two() -> None:
    assert [power_of_two_below(n) for n in (-1, 0, 1, 2, 3, 4, 7, 8, 127)] == [
        *(1, 1, 1, 2, 2, 4, 4, 8, 64)
    ]


def test_constants_of_fake_tensors_are_not_kept() -> None:
    @cached_constant
    def ones(size: int) -> Tensor:
        return torch.ones(size)

    with FakeTensorMode():
        assert type(ones(3)) is not Tensor
    assert type(ones(3)) is Tensor
    assert ones(3) is ones(3)
