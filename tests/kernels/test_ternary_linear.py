from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nas_kernels.int8_linear import int8_linear, quantize_activations
from nas_kernels.ternary_linear import (
    fake_quantize_ternary,
    pack_ternary,
    quantize_ternary,
    ternary_linear_ref,
    unpack_ternary,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_come_back_exactly(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack_ternary(codes)
    assert packed.shape == (rows, (columns + 3) // 4)
    assert packed.dtype == torch.uint8
    unpacked = unpack_ternary(packed, columns)
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)
    # The bytes are as documented: the first column lowest, each code as code + 1.
    first = sum((int(codes[0, k]) + 1) << 2 * k for k in range(min(4, columns)))
    assert int(packed[0, 0]) == first


def test_values_one_by_one() -> None:
    weight = draw(7, 9)
    codes, scale = quantize_ternary(weight)
    mean = sum(abs(w) for w in weight.flatten().tolist()) / weight.numel()
    assert abs(scale.item() - mean) < 1e-6
    for code, value in zip(codes.flatten().tolist(), weight.flatten().tolist(), strict=True):
        ratio = value / mean
        assert code == (0 if abs(ratio) < 0.5 else 1 if ratio > 0 else -1)


def test_the_integer_product_equals_the_reference() -> None:
    for rows, k, n in ((1, 1, 1), (3, 33, 17), (40, 64, 48)):
        x = quantize_activations(draw(2, rows, k))
        codes, scale = quantize_ternary(draw(n, k, seed=1))
        exact = x.values_MK.long() @ codes.long().T * x.scale_M1.double() * scale.double()
        for out in (
            int8_linear(x, codes, scale),
            ternary_linear_ref(x, pack_ternary(codes), scale),
        ):
            torch.testing.assert_close(out.flatten(0, 1).double(), exact, rtol=1e-5, atol=1e-5)


def test_fake_quantisation_is_what_is_stored_and_passes_gradients() -> None:
    weight = draw(5, 11).requires_grad_()
    codes, scale = quantize_ternary(weight)
    rounded = fake_quantize_ternary(weight)
    torch.testing.assert_close(rounded, codes * scale, rtol=1e-5, atol=1e-6)
    (rounded * draw(5, 11, seed=2)).sum().backward()
    assert torch.equal(weight.grad, draw(5, 11, seed=2))


def test_a_zero_weight_stays_zero() -> None:
    codes, scale = quantize_ternary(torch.zeros(3, 4))
    assert (codes == 0).all()
    assert torch.isfinite(scale).all()
