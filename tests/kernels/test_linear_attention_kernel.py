from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from nas_kernels.launching import power_of_two, tile
from nas_kernels.linear_attention import linear_attention, recurrent_linear_attention, step
from nas_kernels.linear_attention.chunked import MIN_LOG_DECAY
from tests.kernels.comparison import (
    DEVICE,
    assert_close,
    compare_with_float64,
    draw,
    far_apart,
    gradients,
    in_wider_rows,
    misaligned,
    wide,
)

pytest.importorskip("triton", reason="triton is not installed")

from nas_kernels.linear_attention.launch import linear_attention_kernels

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
NO_DECAY, PER_HEAD, PER_FEATURE = 0, 1, 2
DECAYS = [NO_DECAY, PER_HEAD, PER_FEATURE]


def make_inputs(
    tokens: int, decay: int, *, heads: int = 2, groups: int = 1, key_dim: int = 17
) -> list[Tensor | None]:
    value_dim, columns = 24, (0, 1, key_dim)[decay]
    gates = -draw(1, groups, tokens, columns, seed=3).abs() / 2
    return [
        draw(1, heads, tokens, key_dim, seed=0),
        draw(1, groups, tokens, key_dim, seed=1),
        draw(1, groups, tokens, value_dim, seed=2),
        gates.clamp_min(MIN_LOG_DECAY) if decay else None,
        draw(1, groups, key_dim, value_dim, seed=4),
    ]


def given(inputs: list[Tensor | None]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs if x is not None]


def compare(inputs: list[Tensor | None], chunk: int | None, bound: float = 3e-6) -> None:
    """Compare outputs, states and every gradient with those of the float64 recurrence."""
    run = partial(linear_attention_kernels, chunk=chunk)
    compare_with_float64(run, recurrent_linear_attention, inputs, bound)


@pytest.mark.parametrize("decay", DECAYS)
def test_outputs_and_gradients(decay: int) -> None:
    inputs = make_inputs(37, decay)
    compare(inputs, chunk=16)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_whole_chunk_of_64_and_many_blocks_of_features(decay: int) -> None:
    inputs = make_inputs(65, decay, heads=1, key_dim=40)
    compare(inputs, chunk=64)


@pytest.mark.parametrize("decay", DECAYS)
def test_strides_are_followed(decay: int) -> None:
    inputs = make_inputs(19, decay, groups=2)
    q, k, v, gates, state = inputs
    # Heads beside each other in a token's row, columns of wider rows, and odd addresses.
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    gates = None if gates is None else in_wider_rows(gates)
    inputs = [q, in_wider_rows(k), misaligned(v), gates, state.mT.contiguous().mT]
    compare(inputs, chunk=16)


def test_one_decay_for_all_tokens_without_memory() -> None:
    q, k, v, _, state = make_inputs(20, NO_DECAY, groups=2)
    decay = torch.tensor([-0.1, -0.5], device=DEVICE)[:, None, None].requires_grad_()
    expanded = decay.expand(1, 2, 20, 1)
    expected = recurrent_linear_attention(*wide([q, k, v, expanded, state]))
    for result, right in zip(
        linear_attention_kernels(q, k, v, expanded, state), expected, strict=True
    ):
        assert_close(result, right)
    assert torch.isfinite(torch.autograd.grad(result.sum(), decay)[0]).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_bf16(decay: int) -> None:
    q, k, v, gates, state = make_inputs(33, decay)
    inputs = [x.bfloat16() for x in (q, k, v)] + [gates, state]
    compare(inputs, chunk=16, bound=8e-3)


@pytest.mark.parametrize("decay", [PER_HEAD, PER_FEATURE])
def test_the_strongest_decay_stays_finite(decay: int) -> None:
    q, k, v, gates, state = make_inputs(64, decay, heads=1)
    strong = torch.full_like(gates, -torch.inf)
    strong[:, :, ::3] = -0.1
    inputs = [q, k, v, strong, state]
    tensors = given(inputs)
    actual = linear_attention_kernels(*inputs)
    clamped = strong.detach().clamp_min(MIN_LOG_DECAY if decay == PER_FEATURE else -1e4)
    for result, right in zip(
        actual, recurrent_linear_attention(*wide([q, k, v, clamped, state])), strict=True
    ):
        assert_close(result, right, 2e-5)
    grads = gradients(actual, tensors)
    assert all(torch.isfinite(x).all() for x in grads)
    assert grads[3][:, :, 1::3].abs().max() == 0  # the clamped ones


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_and_single_tokens(tokens: int) -> None:
    inputs = make_inputs(tokens, PER_FEATURE)
    out, last = linear_attention(*inputs, implementation="triton")
    if tokens == 0:
        assert out.shape == (1, 2, 0, 24)
        assert_close(last, inputs[4])
        return
    expected = recurrent_linear_attention(*wide(inputs))
    assert_close(out, expected[0])
    assert_close(last, expected[1])
    compare(inputs, None)


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    q, k, v, gates, state = make_inputs(17, PER_HEAD)
    exact = wide([q, k, v, gates, state])
    exact[2].requires_grad_()
    expected = torch.autograd.grad(recurrent_linear_attention(*exact)[1].sum(), exact[2])[0]
    v.requires_grad_()
    last = linear_attention_kernels(q, k, v, gates, state)[1]
    assert_close(torch.autograd.grad(last.sum(), v)[0], expected)


def test_states_are_handed_on() -> None:
    q, k, v, gates, _ = make_inputs(37, PER_FEATURE)
    whole, last = linear_attention_kernels(q, k, v, gates, None, 16)
    state, parts = None, []
    for start, end in [(0, 1), (1, 20), (20, 37)]:
        cut = [x[:, :, start:end] for x in (q, k, v, gates)]
        part, state = linear_attention(*cut, state, implementation="triton")
        parts.append(part)
    assert_close(torch.cat(parts, dim=2), whole, 3e-6)
    assert_close(state, last, 3e-6)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_step_updates_in_place(decay: int, dtype: torch.dtype, implementation: str) -> None:
    q, k, v, gates, state = make_inputs(1, decay, heads=4, groups=2)
    token = [x.to(dtype) for x in (q, k, v)]
    expected, after = recurrent_linear_attention(*wide([*token, gates, state]))
    state = in_wider_rows(state)
    token = [in_wider_rows(x[:, :, 0]) for x in token]
    gates = None if gates is None else gates[:, :, 0]
    out = step(*token, gates, state, implementation=implementation)
    assert_close(out, expected[:, :, 0], None if implementation == "triton" else 1e-2)
    assert_close(state, after, 3e-6)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_addresses_are_64_bit() -> None:
    q, k, v, gates, state = make_inputs(3, PER_FEATURE)
    far = partial(far_apart, apart=2**30 + 8, dtype=torch.bfloat16)
    k, v, gates = far(k), far(v), far(gates)
    expected = recurrent_linear_attention(*wide([q, k, v, gates, state]))
    for result, right in zip(
        linear_attention_kernels(q, k, v, gates, state), expected, strict=True
    ):
        assert_close(result, right)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, gates, state = make_inputs(3, PER_HEAD, heads=3, groups=2)
    with pytest.raises(ValueError, match="do not divide 3 query heads"):
        linear_attention(q, k, v, gates, state, implementation="triton")
    q = q[:, :2]
    with pytest.raises(ValueError, match="log_decay has the shape"):
        linear_attention(q, k, v, gates[:, :, :2], state, implementation="triton")
    with pytest.raises(ValueError, match="share memory"):
        step(q[:, :, 0], k[:, :, 0], v[:, :, 0], None, state[:, :1].expand_as(state))


def test_tiles() -> None:
    assert [power_of_two(x) for x in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert [tile(x, 64) for x in (1, 17, 65)] == [16, 32, 64]
