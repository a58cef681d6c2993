from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nas_kernels.int4_linear import (
    GROUP,
    Int4Weight,
    dequantize_int4,
    fake_quantize_int4,
    has_kernel,
    int4_linear,
    int4_linear_ref,
    kernel_layout,
    prefers_kernel,
    quantize_int4,
)
from nas_kernels.int4_linear.ref import pack_nibbles, unpack_nibbles

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def decode_slowly(weight: Int4Weight, in_features: int) -> Tensor:
    """Read the stored bytes one code at a time, in float64."""
    packed, scale, zero = (t.double().tolist() for t in weight)
    rows = []
    for n in range(len(packed)):
        row = []
        for k in range(in_features):
            byte = int(packed[n][k // 2])
            code = byte // 16 if k % 2 else byte % 16
            group = k // GROUP
            row.append((code - 8) * scale[n][group] + zero[n][group])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_come_back_exactly(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, columns), codes)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3])
)
def test_every_value_is_the_nearest_level(rows: int, columns: int, seed: int, size: float) -> None:
    weight = draw(rows, columns, seed=seed) * size
    stored = quantize_int4(weight)
    decoded = dequantize_int4(stored, columns, torch.float64)
    torch.testing.assert_close(decoded, decode_slowly(stored, columns), rtol=1e-9, atol=1e-12)
    step = stored.scale_NG.double().repeat_interleave(GROUP, dim=1)[:, :columns]
    zero = stored.zero_NG.double().repeat_interleave(GROUP, dim=1)[:, :columns]
    # The grid's ends may lie inside the group's by the bf16 rounding of scale and zero point.
    bound = step * (0.5 + 15 * 2**-8) + zero.abs() * 2**-8
    assert ((decoded - weight.double()).abs() <= bound).all()


def test_groups_have_their_own_grid() -> None:
    weight = draw(3, 2 * GROUP)
    weight[:, GROUP:] *= 1000
    small = dequantize_int4(quantize_int4(weight), 2 * GROUP, torch.float32)[:, :GROUP]
    assert rms_ratio(small, weight[:, :GROUP]) < 0.15
    alone = dequantize_int4(quantize_int4(weight[:, :GROUP]), GROUP, torch.float32)
    assert torch.equal(small, alone)


def test_asymmetric_groups_beat_symmetric_ones() -> None:
    weight = draw(64, 8 * GROUP)
    groups = weight.view(64, 8, GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True) / 7
    symmetric = (torch.round(groups / scale).clamp(-8, 7) * scale).flatten(1)
    ours = dequantize_int4(quantize_int4(weight), 8 * GROUP, torch.float32)
    assert rms_ratio(ours, weight) < 0.85 * rms_ratio(symmetric, weight)


@pytest.mark.parametrize("sizes", [(1, 32, 16), (7, 96, 48), (32, 64, 16)])
def test_the_kernel_agrees_with_the_reference(sizes: tuple[int, int, int]) -> None:
    rows, k, n = sizes
    x, weight = draw(rows, k), quantize_int4(draw(n, k, seed=1))
    assert has_kernel(CPU, n, k)
    assert prefers_kernel(x)
    expected = int4_linear_ref(x.double(), weight)
    out = int4_linear(x, weight, kernel_layout(weight, k))
    assert out.dtype == torch.float32
    assert rms_ratio(out.double(), expected) < 5e-3


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 33, 17), (40, 96, 48), (64, 320, 320)])
def test_the_dequantised_way_agrees_with_the_reference(sizes: tuple[int, int, int]) -> None:
    rows, k, n = sizes
    x, weight = draw(rows, k), quantize_int4(draw(n, k, seed=1))
    exact = decode_slowly(weight, k) if n < 64 else dequantize_int4(weight, k, torch.float64)
    assert rms_ratio(int4_linear(x, weight).double(), x.double() @ exact.T) < 5e-3
    assert rms_ratio(int4_linear(x.double(), weight), x.double() @ exact.T) < 1e-12


def test_where_there_is_no_kernel() -> None:
    assert not has_kernel(CPU, 17, 32)
    assert not has_kernel(CPU, 16, 33)
    assert not has_kernel(torch.device("meta"), 16, 32)
    assert not prefers_kernel(draw(200, 8))
    assert not prefers_kernel(draw(1, 8).double())


def test_fake_quantisation_is_what_is_stored_and_passes_gradients() -> None:
    weight = draw(5, 33).requires_grad_()
    rounded = fake_quantize_int4(weight)
    stored = dequantize_int4(quantize_int4(weight), 33, torch.float32)
    torch.testing.assert_close(rounded, stored, rtol=1e-6, atol=1e-7)
    (rounded * draw(5, 33, seed=2)).sum().backward()
    assert torch.equal(weight.grad, draw(5, 33, seed=2))


def test_zero_and_constant_weights_stay_finite() -> None:
    for value in (0.0, 0.3, -1e-20, 1e20):
        weight = torch.full((2, 40), value)
        decoded = dequantize_int4(quantize_int4(weight), 40, torch.float32)
        torch.testing.assert_close(decoded, weight, rtol=2**-8, atol=1e-10)
