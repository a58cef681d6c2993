from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.decode_attention import decode_attention, decode_attention_ref
from nas_kernels.dispatch import REFERENCE, TRITON, triton_available
from tests.kernels.comparison import (
    DEVICE,
    assert_close,
    draw,
    far_apart,
    in_wider_rows,
    misaligned,
)

FLOATS = 2e-5 if DEVICE.type == "cuda" else 3e-6
"""What fp32 may differ by: its products are three of TF32 on a GPU."""
triton_only = pytest.mark.skipif(not triton_available(), reason="triton is not installed")
IMPLEMENTATIONS = [REFERENCE, pytest.param(TRITON, marks=triton_only)]

SHAPES = [
    # B, H, G, T, S, K, V
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 4, 1, 70, 8, 24),
    (2, 6, 2, 1, 131, 20, 16),
    (1, 8, 1, 3, 90, 32, 32),
    (1, 20, 1, 1, 40, 16, 130),
]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, groups, tokens, slots, width, value_width = shape
    q = draw(batch, heads, tokens, width, dtype=dtype)
    k = draw(batch, groups, slots, width, seed=1, dtype=dtype)
    return q, k, draw(batch, groups, slots, value_width, seed=2, dtype=dtype)


def slowly(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, first: int
) -> Tensor:
    """Attend one query at a time, in float64."""
    batch, heads, tokens, width = q.shape
    out = q.new_zeros(batch, heads, tokens, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for t in range(tokens):
                position = lengths[b] - tokens + t
                seen = [
                    s
                    for s in range(position + 1)
                    if window is None or position - s < window or s < first
                ]
                if seen:
                    scores = k[b, g, seen].double() @ q[b, h, t].double() / math.sqrt(width)
                    out[b, h, t] = scores.softmax(dim=0) @ v[b, g, seen].double()
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_keys(shape: tuple[int, ...], dtype: torch.dtype, implementation: str) -> None:
    q, k, v = inputs(shape, dtype)
    out = decode_attention(q, k, v, implementation=implementation)
    assert out.dtype == dtype
    bound = FLOATS if dtype == torch.float32 else None
    assert_close(out, slowly(q, k, v, [shape[4]] * shape[0], None, 0), bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("window", "first"), [(None, 0), (1, 0), (17, 0), (9, 4), (200, 3)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_lengths_and_windows(
    window: int | None, first: int, tokens: int, implementation: str
) -> None:
    lengths = [90, 33, tokens, 2]
    q, k, v = inputs((4, 4, 2, tokens, 100, 8, 8))
    for b, length in enumerate(lengths):
        # What is not used may hold anything.
        k[b, :, length:], v[b, :, length:] = math.nan, math.inf
    out = decode_attention(
        q, k, v, torch.tensor(lengths, device=DEVICE), window=window, first_tokens=first,
        implementation=implementation,
    )  # fmt: skip
    assert_close(out, slowly(q, k, v, lengths, window, first), FLOATS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_what_pytorch_computes(implementation: str) -> None:
    q, k, v = (x.double() for x in inputs((2, 4, 2, 1, 50, 8, 8)))
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.2)
    if implementation == TRITON:
        q, k, v = q.float(), k.float(), v.float()
    assert_close(
        decode_attention(q, k, v, scale=0.2, implementation=implementation), expected, 1e-6
    )


@triton_only
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_number_of_parts_changes_nothing(parts: int) -> None:
    from nas_kernels.decode_attention import triton_kernel

    q, k, v = inputs((3, 2, 1, 2, 130, 8, 8))
    length = torch.tensor([130, 65, 0], device=DEVICE)
    for window, first in ((None, 0), (70, 5)):
        given = length, window, first, 0.3
        out = triton_kernel.decode_attention(q, k, v, *given, parts)
        assert_close(out, decode_attention_ref(q.double(), k.double(), v.double(), *given), FLOATS)
        assert (out[2] == 0).all()


@triton_only
def test_strides() -> None:
    q, k, v = inputs((2, 4, 2, 2, 40, 8, 8))
    expected = decode_attention(q.double(), k.double(), v.double(), 33)
    cases = [
        [misaligned(x) for x in (q, k, v)],
        [in_wider_rows(x) for x in (q, k, v)],
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)],
    ]
    for given in cases:
        assert_close(decode_attention(*given, 33, implementation=TRITON), expected, FLOATS)


@triton_only
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_heads_far_apart() -> None:
    q, k, v = inputs((1, 3, 3, 1, 5, 8, 8))
    far = far_apart(k, axis=1)
    out = decode_attention(q, far, v, implementation=TRITON)
    assert_close(out, decode_attention(q.double(), far.double(), v.double()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 1, 5, 8, 8), (2, 2, 1, 0, 5, 8, 8), (2, 2, 1, 1, 0, 8, 8)]
)
def test_nothing_to_attend_to(shape: tuple[int, ...], implementation: str) -> None:
    out = decode_attention(*inputs(shape), implementation=implementation)
    assert out.shape == (shape[0], 2, shape[3], 8)
    assert (out == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = inputs((1, 4, 2, 1, 5, 8, 8))
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q, k[..., :7], v)
    with pytest.raises(ValueError, match="window=0"):
        decode_attention(q, k, v, window=0)


def test_gradients_are_left_to_pytorch() -> None:
    q, k, v = inputs((1, 4, 2, 1, 5, 8, 8))
    q.requires_grad_()
    decode_attention(q, k, v).sum().backward()
    assert q.grad is not None
    if triton_available():
        with pytest.raises(RuntimeError, match="gradient"):
            decode_attention(q, k, v, implementation=TRITON)
