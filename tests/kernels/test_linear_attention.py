from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.linear_attention import linear_attention, recurrent_linear_attention
from nas_kernels.linear_attention.chunked import CHUNK, CHUNK_WITH_DECAY, MIN_LOG_DECAY

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
LENGTHS = [1, 2, 7, CHUNK_WITH_DECAY, CHUNK_WITH_DECAY + 1, CHUNK, CHUNK + 1, 131]


def make_inputs(
    tokens: int,
    decay: bool,
    state: bool,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # Odd sizes, and values wider than keys.
    num_heads, groups, batch, key_dim, value_dim = *heads, 2, 5, 7
    gates = (-draw(batch, groups, tokens, key_dim).abs() * 0.5).clamp_min(MIN_LOG_DECAY)
    return (
        draw(batch, num_heads, tokens, key_dim),
        draw(batch, groups, tokens, key_dim),
        draw(batch, groups, tokens, value_dim),
        gates if decay else None,
        draw(batch, groups, key_dim, value_dim) if state else None,
    )


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def definition(inputs: Inputs) -> Tensor:
    """Sum over all earlier tokens with numbers, not matrices: slower still than the reference."""
    q, k, v, decay, state = inputs
    batch, heads, tokens = q.shape[:3]
    groups = k.shape[1]
    out = torch.zeros(batch, heads, tokens, v.shape[-1], dtype=q.dtype)
    gates = torch.zeros_like(k) if decay is None else decay
    for head in range(heads):
        g = head // (heads // groups)
        for t in range(tokens):
            for s in range(t + 1):
                weight = q[:, head, t] * k[:, g, s] * gates[:, g, s + 1 : t + 1].sum(dim=1).exp()
                out[:, head, t] += weight.sum(dim=1, keepdim=True) * v[:, g, s]
            if state is not None:
                read = q[:, head, t] * gates[:, g, : t + 1].sum(dim=1).exp()
                out[:, head, t] += (read[:, :, None] * state[:, g]).sum(dim=1)
    return out


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_the_recurrent_reference_is_the_sum(decay: bool, state: bool) -> None:
    inputs = make_inputs(6, decay, state)
    torch.testing.assert_close(recurrent_linear_attention(*inputs)[0], definition(inputs))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_chunks_equal_the_recurrence(tokens: int, decay: bool, state: bool) -> None:
    inputs = make_inputs(tokens, decay, state)
    for actual, expected in zip(
        linear_attention(*inputs), recurrent_linear_attention(*inputs), strict=True
    ):
        assert actual.shape == expected.shape
        assert rms_ratio(actual, expected) < 1e-10


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_every_grouping_of_heads(heads: tuple[int, int]) -> None:
    inputs = make_inputs(40, decay=True, state=True, heads=heads)
    expected = recurrent_linear_attention(*inputs)[0]
    assert rms_ratio(linear_attention(*inputs)[0], expected) < 1e-10


@pytest.mark.parametrize("tokens", [1, 33, 70])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_gradients_equal_the_recurrence(tokens: int, decay: bool, state: bool) -> None:
    inputs = make_inputs(tokens, decay, state)
    given = [x.requires_grad_() for x in inputs if x is not None]
    weights = torch.Generator().manual_seed(9)

    def gradients(function: object) -> tuple[Tensor, ...]:
        out, last = function(*inputs)  # type: ignore[operator]
        weights.manual_seed(9)
        loss = sum(
            (x * torch.randn(x.shape, generator=weights, dtype=x.dtype)).sum() for x in (out, last)
        )
        return torch.autograd.grad(loss, given, materialize_grads=True)

    expected = gradients(recurrent_linear_attention)
    for actual, right in zip(gradients(linear_attention), expected, strict=True):
        if right.abs().max() == 0:  # the decay of a single token without a state before it
            assert actual.abs().max() == 0
        else:
            assert rms_ratio(actual, right) < 1e-9


@pytest.mark.parametrize("decay", [False, True])
def test_gradcheck(decay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small chunks, so that a short input has several.
    for name in ("CHUNK", "CHUNK_WITH_DECAY"):
        monkeypatch.setattr(f"nas_kernels.linear_attention.chunked.{name}", 2)
    inputs = make_inputs(5, decay, state=True, heads=(2, 1))
    given = [None if x is None else x[:1].requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(linear_attention, given)


@pytest.mark.parametrize("decay", [False, True])
def test_any_split_hands_on_the_state(decay: bool) -> None:
    q, k, v, g, _ = make_inputs(131, decay, state=False)
    whole, last = linear_attention(q, k, v, g)
    state, parts = None, []
    for start, end in [(0, 1), (1, 40), (40, 41), (41, 105), (105, 131)]:
        cut = [None if x is None else x[:, :, start:end] for x in (q, k, v, g)]
        part, state = linear_attention(*cut, state)
        parts.append(part)
    assert rms_ratio(torch.cat(parts, dim=2), whole) < 1e-10
    assert rms_ratio(state, last) < 1e-10


@pytest.mark.parametrize("decay", [False, True])
def test_float32_is_as_exact_as_float32_can_be(decay: bool) -> None:
    exact = recurrent_linear_attention(*make_inputs(131, decay, state=True))[0]
    rounded = linear_attention(*make_inputs(131, decay, state=True, dtype=torch.float32))[0]
    assert rms_ratio(rounded.double(), exact) < 1e-5


@pytest.mark.parametrize("tokens", [1, 32, 100])
def test_the_strongest_decay_stays_finite(tokens: int) -> None:
    q, k, v, _, state = make_inputs(tokens, True, state=True, dtype=torch.float32)
    strong = torch.full_like(k, -1e4)
    out, last = linear_attention(q, k, v, strong, state)
    clamped = torch.full_like(k, MIN_LOG_DECAY)
    expected, expected_last = recurrent_linear_attention(q, k, v, clamped, state)
    assert rms_ratio(out, expected) < 1e-4
    assert rms_ratio(last, expected_last) < 1e-4


def test_inputs_are_left_alone() -> None:
    for tokens in (1, 40):
        inputs = make_inputs(tokens, True, True)
        before = [x.clone() for x in inputs if x is not None]
        linear_attention(*inputs)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
