"""The Triton kernels of int8, int8 weight-only, int4 and ternary linear maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.dispatch import REFERENCE, TRITON, triton_available
from nas_kernels.int4_linear import (
    GROUP,
    Int4Weight,
    dequantize_int4,
    int4_linear,
    quantize_int4,
)
from nas_kernels.int8_linear import int8_linear, quantize_activations, quantize_weight
from nas_kernels.int8_weight_linear import dequantize_rows, int8_weight_linear, quantize_rows
from nas_kernels.ternary_linear import (
    pack_ternary,
    quantize_ternary,
    ternary_linear,
    unpack_ternary,
)
from tests.kernels.comparison import (
    DEVICE,
    TOLERANCE,
    assert_close,
    draw,
    far_apart,
    in_wider_rows,
    misaligned,
)

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed")

FLOATS = 2e-3 if DEVICE.type == "cuda" else TOLERANCE[torch.float32]
"""What products of fp32 may differ by: they are TF32, but not in the interpreter."""
DTYPES = [torch.float32, torch.bfloat16]
MAXIMUM = 50, 448
"""Rows and columns of the weights that tests cut theirs from."""
SIZES = [(1, 1, 1), (1, 37, 96), (1, 9, 448), (3, 37, 96), (16, 17, 160), (18, 50, 96), (66, 5, 32)]
"""Tokens, rows and columns; one, a few and many tokens take different kernels or tiles."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply integers, which no GPU does, exactly."""
    return (x.cpu().long() @ weight.cpu().long().T).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 64)])
def test_quantised_activations_are_those_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = draw(*shape, dtype=dtype)
    x[..., 0, :] = 0
    given = in_wider_rows(misaligned(x))
    wanted = quantize_activations(x, implementation=REFERENCE)
    out = quantize_activations(given, shape[-1], implementation=TRITON)
    assert torch.equal(out.values_MK, wanted.values_MK)
    assert torch.equal(out.scale_M1, wanted.scale_M1)
    assert out[2:] == wanted[2:]


def test_halves_are_rounded_to_even() -> None:
    # A scale of exactly 1: the values are their own codes.
    x = torch.cat([torch.arange(-5.5, 6.0), torch.tensor([127.0, -0.49999997, 0.49999997])])
    x = x.to(DEVICE)
    out = quantize_activations(x, implementation=TRITON)
    wanted = quantize_activations(x, implementation=REFERENCE)
    assert torch.equal(out.scale_M1, wanted.scale_M1)
    assert torch.equal(out.values_MK, wanted.values_MK)


def test_long_rows_are_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from nas_kernels.int8_linear import triton_kernel

    monkeypatch.setattr(triton_kernel, "WIDEST", 16)
    x = draw(3, 50)
    wanted = quantize_activations(x, implementation=REFERENCE)
    assert torch.equal(quantize_activations(x, implementation=TRITON).values_MK, wanted.values_MK)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_token_with_nan_stays_nan() -> None:
    x = draw(3, 20)
    x[1, 7] = float("nan")
    scale = quantize_activations(x, implementation=TRITON).scale_M1[:, 0]
    assert scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("sizes", SIZES)
def test_int8_is_exact(sizes: tuple[int, int, int]) -> None:
    tokens, rows, columns = sizes
    values, scale = quantize_weight(draw(*MAXIMUM, seed=1))
    weight, scale = values[:rows, :columns], scale[:rows]
    x = quantize_activations(draw(tokens, columns))
    sums = product(x.values_MK, weight)
    assert torch.equal(
        int8_linear(x, weight, scale, implementation=TRITON), sums.float() * x.scale_M1 * scale
    )
    bias = draw(2 * rows, seed=2)[::2]
    exact = sums * x.scale_M1.double() * scale.double() + bias.double()
    assert_close(int8_linear(x, misaligned(weight), scale, bias, TRITON), exact)


@pytest.mark.parametrize("sizes", SIZES)
def test_ternary_is_exact(sizes: tuple[int, int, int]) -> None:
    tokens, rows, columns = sizes
    codes, scale = quantize_ternary(draw(*MAXIMUM, seed=1))
    packed = pack_ternary(codes)[:rows, : -(-columns // 4)]
    x = quantize_activations(draw(tokens, columns))
    sums = product(x.values_MK, codes[:rows, :columns])
    assert torch.equal(
        ternary_linear(x, packed, scale, implementation=TRITON), sums.float() * x.scale_M1 * scale
    )
    bias = draw(rows, seed=2)
    wanted = ternary_linear(x, packed, scale, bias, REFERENCE)
    assert_close(ternary_linear(x, misaligned(packed), scale, bias, TRITON), wanted, 1e-6)
    odd = quantize_activations(draw(tokens, max(columns - 3, 1)))
    reference = int8_linear(odd, unpack_ternary(packed, odd.shape[1]), scale)
    assert_close(ternary_linear(odd, packed, scale, implementation=TRITON), reference, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_int8_weights(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, columns = sizes
    values, scale = quantize_rows(draw(*MAXIMUM, seed=1))
    weight, scale, bias = values[:rows, :columns], scale[:rows], draw(rows, seed=2)
    x = in_wider_rows(misaligned(draw(tokens, columns, dtype=dtype)))
    exact = x.double() @ dequantize_rows(weight, scale, torch.float64).T
    out = int8_weight_linear(x, weight, scale, implementation=TRITON)
    assert out.dtype == dtype
    bound = FLOATS if dtype == torch.float32 else None
    assert_close(out, exact, bound)
    assert_close(int8_weight_linear(x, weight, scale, bias, TRITON), exact + bias.double(), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_int4_weights(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, columns = sizes
    maximal = quantize_int4(draw(*MAXIMUM, seed=1))
    weight = _slice(maximal, rows, columns)
    x = in_wider_rows(misaligned(draw(tokens, columns, dtype=dtype)))
    exact = x.double() @ dequantize_int4(maximal, MAXIMUM[1], torch.float64)[:rows, :columns].T
    out = int4_linear(x, weight, implementation=TRITON)
    assert out.dtype == dtype
    # On a GPU the weight is rounded to the dtype of x, as x is.
    bound = FLOATS if dtype == torch.float32 else None
    assert_close(out, exact, bound)
    shifted, bias = Int4Weight(*map(misaligned, weight)), draw(rows, seed=2)
    assert_close(int4_linear(x, shifted, None, bias, TRITON), exact + bias.double(), bound)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("columns", [33, 47, 95])
def test_int4_columns_that_fill_no_group(tokens: int, columns: int) -> None:
    maximal = quantize_int4(draw(*MAXIMUM, seed=1))
    x = draw(tokens, columns)
    exact = x.double() @ dequantize_int4(maximal, MAXIMUM[1], torch.float64)[:7, :columns].T
    assert_close(int4_linear(x, _slice(maximal, 7, columns), implementation=TRITON), exact, FLOATS)
    own = quantize_int4(draw(7, columns, seed=3))
    exact = x.double() @ dequantize_int4(own, columns, torch.float64).T
    assert_close(int4_linear(x, own, implementation=TRITON), exact, FLOATS)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splitting_k_changes_nothing(tokens: int, splits: int) -> None:
    from nas_kernels.int4_linear.triton_kernel import int4_linear as int4_kernel
    from nas_kernels.packed_linear.triton_kernel import packed_linear

    columns, dtype, bias = 2100, torch.float32, draw(6, seed=2)
    values, scale = quantize_weight(draw(6, columns, seed=1))
    x = draw(tokens, columns)
    quantized = quantize_activations(x)
    out = packed_linear(
        quantized.values_MK, values, scale, quantized.scale_M1[:, 0], None, 1, dtype, splits
    )
    sums = product(quantized.values_MK, values)
    assert torch.equal(out, sums.float() * quantized.scale_M1 * scale)
    weight = quantize_int4(draw(6, columns, seed=1))
    exact = x.double() @ dequantize_int4(weight, columns, torch.float64).T + bias.double()
    assert_close(int4_kernel(x, weight, bias, splits), exact, FLOATS)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_rows_far_apart() -> None:
    columns = 32
    values = far_apart(draw(3, columns).mul(40).clamp(-127, 127), dtype=torch.int8)
    scale = torch.ones(3)
    quantized = quantize_activations(draw(2, columns, seed=1))
    for x in (quantized, quantize_activations(draw(1, columns, seed=1))):
        wanted = int8_linear(x, values.contiguous(), scale, implementation=REFERENCE)
        assert torch.equal(int8_linear(x, values, scale, implementation=TRITON), wanted)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (2, 3, 64), (64,)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape), quantize_int4(draw(5, 64, seed=1))
    out = int4_linear(x, weight, implementation=TRITON)
    assert out.shape == (*shape[:-1], 5)
    assert_close(out, int4_linear(x.double(), weight), FLOATS)
    values, scale = quantize_rows(draw(5, 64, seed=1))
    assert int8_weight_linear(x, values, scale, implementation=TRITON).shape == out.shape
    quantized = quantize_activations(x, implementation=TRITON)
    assert int8_linear(quantized, values, scale.float(), implementation=TRITON).shape == out.shape
    nothing = Int4Weight(*(tensor[:0] for tensor in weight))
    assert int4_linear(x, nothing, implementation=TRITON).shape == (*shape[:-1], 0)


def test_gradients_are_left_to_pytorch() -> None:
    x, weight = draw(3, 64).requires_grad_(), quantize_int4(draw(5, 64, seed=1))
    with pytest.raises(RuntimeError, match="gradient"):
        int4_linear(x, weight, implementation=TRITON)
    int4_linear(x, weight).sum().backward()
    assert_close(x.grad, dequantize_int4(weight, 64, torch.float64).sum(0).expand(3, -1), 1e-2)
    with torch.no_grad():
        out = int4_linear(x, weight, implementation=TRITON)
    assert_close(out, int4_linear(x.double(), weight), FLOATS)


def test_float64_is_left_to_pytorch() -> None:
    x, weight = draw(3, 64, dtype=torch.float64), quantize_int4(draw(5, 64, seed=1))
    with pytest.raises(RuntimeError, match="float64"):
        int4_linear(x, weight, implementation=TRITON)


def _slice(weight: Int4Weight, rows: int, columns: int) -> Int4Weight:
    groups = -(-columns // GROUP)
    return Int4Weight(
        weight.packed_NP[:rows, : -(-columns // 2)],
        weight.scale_NG[:rows, :groups],
        weight.zero_NG[:rows, :groups],
    )
