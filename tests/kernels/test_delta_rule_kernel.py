from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.delta_rule import delta_rule, recurrent_delta_rule, step
from tests.kernels.comparison import (
    DEVICE,
    assert_close,
    compare_with_float64,
    draw,
    far_apart,
    in_wider_rows,
    misaligned,
    wide,
)

pytest.importorskip("triton", reason="triton is not installed")

from nas_kernels.delta_rule.launch import delta_rule_kernels

KEY, VALUE = 17, 24


def make_inputs(
    tokens: int, *, heads: int = 2, groups: int = 1, key_dim: int = KEY
) -> list[Tensor]:
    return [
        draw(1, heads, tokens, key_dim, seed=0),
        F.normalize(draw(1, groups, tokens, key_dim, seed=1), dim=-1),
        draw(1, groups, tokens, VALUE, seed=2),
        draw(1, groups, tokens, seed=3).sigmoid(),
        draw(1, groups, key_dim, VALUE, seed=4),
    ]


def compare(inputs: list[Tensor], chunk: int | None, bound: float = 2e-6) -> None:
    """Compare outputs, states and every gradient with those of the float64 recurrence."""
    run = partial(delta_rule_kernels, chunk=chunk)
    compare_with_float64(run, recurrent_delta_rule, inputs, bound)


def test_outputs_and_gradients() -> None:
    compare(make_inputs(37), chunk=16)


def test_a_whole_chunk_of_64_and_many_blocks_of_features() -> None:
    compare(make_inputs(65, heads=1, key_dim=40), chunk=64)


def test_strides_are_followed() -> None:
    q, k, v, beta, state = make_inputs(19, groups=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    beta = beta.mT.contiguous().mT
    compare([q, in_wider_rows(k), misaligned(v), beta, state.mT.contiguous().mT], chunk=16)


def test_bf16() -> None:
    *inputs, state = make_inputs(33)
    compare([x.bfloat16() for x in inputs] + [state], chunk=16, bound=1e-2)


def test_mixed_types_are_computed_in_fp32() -> None:
    q, k, v, beta, state = make_inputs(20)
    inputs = [q, k, v.bfloat16(), beta, state]
    for result, right in zip(
        delta_rule_kernels(*inputs), recurrent_delta_rule(*wide(inputs)), strict=True
    ):
        assert result.dtype == torch.float32
        assert_close(result, right)


def test_equal_keys_that_replace_everything_are_exact() -> None:
    # Powers of the matrix that is inverted would reach 1e17 here.
    q, k, v, beta, _ = make_inputs(64, heads=1)
    k, beta = k[:, :, :1].expand_as(k), torch.ones_like(beta)
    expected = (q * k).sum(dim=-1, keepdim=True) * v
    assert_close(delta_rule_kernels(q, k, v, beta, None, 64)[0], expected, 5e-6)


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_and_single_tokens(tokens: int) -> None:
    inputs = make_inputs(tokens)
    if tokens == 0:
        out, last = delta_rule(*inputs, implementation="triton")
        assert out.shape == (1, 2, 0, VALUE)
        assert_close(last, inputs[4])
        return
    for given in (inputs, inputs[:4]):
        results = delta_rule(*given, implementation="triton")
        for result, right in zip(results, recurrent_delta_rule(*wide(given)), strict=True):
            assert_close(result, right)
    compare(inputs, None)


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    *inputs, state = make_inputs(17)
    exact = [*wide(inputs), state.double().requires_grad_()]
    expected = torch.autograd.grad(recurrent_delta_rule(*exact)[1].sum(), exact[4])[0]
    state.requires_grad_()
    last = delta_rule_kernels(*inputs, state)[1]
    assert_close(torch.autograd.grad(last.sum(), state)[0], expected)


def test_states_are_handed_on() -> None:
    inputs = make_inputs(37)[:4]
    whole, last = delta_rule_kernels(*inputs, None, 16)
    state, parts = None, []
    for cut in zip(*(x.split([1, 19, 17], dim=2) for x in inputs), strict=True):
        part, state = delta_rule(*cut, state, implementation="triton")
        parts.append(part)
    assert_close(torch.cat(parts, dim=2), whole)
    assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_step_updates_in_place(dtype: torch.dtype, implementation: str) -> None:
    *token, state = make_inputs(1, heads=4, groups=2)
    token = [x.to(dtype) for x in token]
    expected, after = recurrent_delta_rule(*wide([*token, state]))
    state = in_wider_rows(state)
    q, k, v, beta = (x[:, :, 0] for x in token)
    out = step(in_wider_rows(q), k, misaligned(v), beta, state, implementation=implementation)
    assert_close(out, expected[:, :, 0])
    assert_close(state, after)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_addresses_are_64_bit() -> None:
    q, k, v, beta, state = make_inputs(3)
    far = partial(far_apart, apart=2**30 + 8, dtype=torch.bfloat16)
    inputs = [q, far(k), far(v), far(beta, axis=-1), state]
    for result, right in zip(
        delta_rule_kernels(*inputs), recurrent_delta_rule(*wide(inputs)), strict=True
    ):
        assert_close(result, right)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, beta, state = make_inputs(3, heads=3, groups=2)
    with pytest.raises(ValueError, match="do not divide 3 query heads"):
        delta_rule(q, k, v, beta, state, implementation="triton")
    q = q[:, :2]
    with pytest.raises(ValueError, match="beta_BGT has the shape"):
        delta_rule(q, k, v, beta[:, :1], state, implementation="triton")
    with pytest.raises(RuntimeError, match="300 features"):
        delta_rule(*make_inputs(2, key_dim=300), implementation="triton")
    with pytest.raises(ValueError, match="share memory"):
        step(q[:, :, 0], k[:, :, 0], v[:, :, 0], beta[:, :, 0], state[:, :1].expand_as(state))
