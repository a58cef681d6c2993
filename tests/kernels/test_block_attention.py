from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.block_attention import (
    BLOCK,
    Pattern,
    block_attention,
    block_attention_ref,
    visible_pairs,
)
from nas_kernels.block_attention.pattern import tile_lists
from nas_kernels.dispatch import TRITON, triton_available
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
CPU = torch.device("cpu")

PATTERNS = [
    Pattern(),
    Pattern(causal=False),
    Pattern(window=1),
    Pattern(window=20),
    Pattern(window=9, dilation=3, global_tokens=2),
    Pattern(causal=False, window=11),
    Pattern(causal=False, window=4, dilation=2, global_tokens=5),
    Pattern(segment=17),
    Pattern(causal=False, segment=30),
    Pattern(window=15, segment=35),
]
BACKWARD = 4
"""The tolerance of gradients in units of that of outputs."""


def inputs(
    batch: int, heads: int, groups: int, tokens: int, keys: int, width: int, value_width: int
) -> list[Tensor]:
    q, k = draw(batch, heads, tokens, width), draw(batch, groups, keys, width, seed=1)
    return [q, k, draw(batch, groups, keys, value_width, seed=2)]


def compare(
    given: list[Tensor], pattern: Pattern, block_mask: Tensor | None = None, bound: float = FLOATS
) -> None:
    """Run the kernel as it is given its inputs, and the reference in float64; compare it all."""
    ours = [x.detach().requires_grad_() for x in given]
    exact = [x.detach().double().requires_grad_() for x in given]
    scale = given[0].shape[-1] ** -0.5
    results = block_attention(*ours, pattern, block_mask_IJ=block_mask, implementation=TRITON)
    expected = block_attention_ref(*exact, pattern, scale, block_mask)
    assert results[0].dtype == given[0].dtype
    seen = expected[1].isfinite()
    assert (results[1].isfinite() == seen).all()
    assert_close(results[0], expected[0], bound)
    assert_close(results[1][seen], expected[1][seen], FLOATS)
    for out, lse in (results, expected):
        weight = draw(*out.shape, seed=3, dtype=out.dtype)
        lse_weight = draw(*lse.shape, seed=4, dtype=lse.dtype)
        ((out * weight).sum() + (lse * lse_weight)[seen].sum()).backward()
    for ours_x, exact_x in zip(ours, exact, strict=True):
        assert_close(ours_x.grad, exact_x.grad, BACKWARD * bound)


def sees(pattern: Pattern, query: int, key: int) -> bool:
    """Say for one pair what a pattern means."""
    if pattern.causal and key > query:
        return False
    if pattern.segment is not None and query // pattern.segment != key // pattern.segment:
        return False
    if pattern.window is None or key < pattern.global_tokens:
        return True
    if not pattern.causal and query < pattern.global_tokens:
        return True
    steps, rest = divmod(abs(query - key), pattern.dilation)
    return rest == 0 and steps < pattern.window


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 70, 90])
def test_what_patterns_show(pattern: Pattern, tokens: int) -> None:
    keys = 90
    visible = visible_pairs(pattern, tokens, keys, CPU, None)
    for t in range(tokens):
        row = [sees(pattern, keys - tokens + t, s) for s in range(keys)]
        assert visible[t].tolist() == row


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (150, 150), (70, 133)])
def test_lists_name_all_tiles_that_hold_something(
    pattern: Pattern, tokens: int, keys: int, block: int
) -> None:
    visible = visible_pairs(pattern, tokens, keys, CPU, None)
    lists = tile_lists(pattern, tokens, keys, block, CPU)
    padded = F.pad(visible, (0, -keys % block, 0, -tokens % block))
    needed = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1)
    for rows, found, counts in (
        (needed, lists.keys_IN, lists.num_keys_I),
        (needed.T, lists.queries_JN, lists.num_queries_J),
    ):
        listed = torch.zeros_like(rows)
        for i, count in enumerate(counts.tolist()):
            names = found[i, :count].tolist()
            assert names == sorted(set(names))
            listed[i, names] = True
        assert not (rows & ~listed).any()
        if pattern.dilation == 1:
            # Without gaps in the window nothing is visited in vain.
            assert torch.equal(rows, listed)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_what_pytorch_computes(causal: bool) -> None:
    q, k, v = (x.double() for x in inputs(2, 4, 2, 30, 30, 8, 8))
    pattern = Pattern(causal, window=5)
    mask = visible_pairs(pattern, 30, 30, q.device, None)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    out, lse = block_attention(q, k, v, pattern)
    assert_close(out, expected, 1e-12)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / math.sqrt(8)
    assert_close(lse, scores.masked_fill(~mask, -math.inf).logsumexp(-1), 1e-12)


@triton_only
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: Pattern) -> None:
    compare(inputs(1, 2, 1, 50, 50, 8, 8), pattern)


@triton_only
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (2, 4, 2, 33, 33, 20, 7),
        (1, 2, 2, 5, 40, 8, 40),
        (1, 1, 1, 20, 20, 16, 70),
        (0, 2, 1, 5, 5, 8, 8),
        (1, 2, 1, 0, 40, 8, 8),
    ],
)
def test_shapes(shape: tuple[int, ...]) -> None:
    compare(inputs(*shape), Pattern(window=7, global_tokens=1))


@triton_only
def test_half_precision() -> None:
    given = [x.bfloat16() for x in inputs(1, 2, 1, 70, 70, 8, 8)]
    compare(given, Pattern(window=20), bound=8e-3)


@triton_only
def test_strides() -> None:
    given, pattern = inputs(2, 1, 1, 20, 20, 8, 8), Pattern(window=7)
    for change in (
        misaligned,
        in_wider_rows,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        compare([change(x) for x in given], pattern)
    q, k, v = (x.requires_grad_() for x in given)
    # The gradient of a sum is one number everywhere, in no memory of its own.
    block_attention(q, k, v, pattern, implementation=TRITON)[0].sum().backward()
    exact = [x.detach().double().requires_grad_() for x in given]
    block_attention(*exact, pattern)[0].sum().backward()
    for ours, expected in zip(given, exact, strict=True):
        assert (ours.grad - expected.grad).abs().max() < 1e-5


@triton_only
@pytest.mark.parametrize("causal", [True, False])
def test_block_masks(causal: bool) -> None:
    shown = torch.tensor(
        [[True, False, True], [False, True, True], [False, False, False]], device=DEVICE
    )
    compare(inputs(1, 2, 1, 140, 140, 8, 8), Pattern(causal, window=90), shown)


@triton_only
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_heads_far_apart() -> None:
    q, k, v = inputs(1, 3, 3, 5, 5, 8, 8)
    far = far_apart(k, axis=1)
    out, _ = block_attention(q, far, v, Pattern(), implementation=TRITON)
    assert_close(out, block_attention(q.double(), far.double(), v.double(), Pattern())[0])


@triton_only
def test_parts_of_one_softmax_can_be_mixed() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 1, 20, 20, 8, 8))
    parts = [
        block_attention(q, keys, values, Pattern(causal=False), implementation=TRITON)
        for keys, values in ((k, v), (k.flip(2), v.flip(2)))
    ]
    share = torch.stack([lse for _, lse in parts]).softmax(dim=0)
    mixed = sum(part[..., None] * out for part, (out, _) in zip(share, parts, strict=True))
    weight = draw(*mixed.shape, seed=3)
    grads = torch.autograd.grad((mixed * weight).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = block_attention(*exact, Pattern(causal=False))[0]
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    assert_close(mixed, expected, FLOATS)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, BACKWARD * FLOATS)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = inputs(1, 4, 2, 5, 5, 8, 8)
    with pytest.raises(ValueError, match="do not fit"):
        block_attention(q[:, :3], k, v, Pattern())
    with pytest.raises(ValueError, match="T <= S"):
        block_attention(q, k[:, :, :4], v[:, :, :4], Pattern())
    with pytest.raises(ValueError, match="window=0"):
        block_attention(q, k, v, Pattern(window=0))
    with pytest.raises(ValueError, match="block_mask_IJ"):
        block_attention(q, k, v, Pattern(), block_mask_IJ=torch.ones(2, 1, dtype=torch.bool))
    assert BLOCK % 32 == 0
