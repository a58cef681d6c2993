from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.delta_rule import chunked, delta_rule, recurrent_delta_rule

LENGTHS = [1, 2, 3, chunked.CHUNK - 1, chunked.CHUNK, chunked.CHUNK + 1, 75]
KEY, VALUE = 5, 7


def make_inputs(
    tokens: int, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_heads, groups = heads
    inputs = [
        draw(2, num_heads, tokens, KEY),
        F.normalize(draw(2, groups, tokens, KEY), dim=-1),
        draw(2, groups, tokens, VALUE),
        draw(2, groups, tokens).sigmoid(),
        draw(2, groups, KEY, VALUE),
    ]
    return [x.to(dtype) for x in inputs]


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_the_recurrent_reference_is_the_published_one() -> None:
    q, k, v, beta, state = make_inputs(6, heads=(2, 2))
    memory = state.transpose(-1, -2)  # the paper's S maps keys to values
    for t in range(6):
        k_t, v_t, beta_t = k[:, :, t, :, None], v[:, :, t, :, None], beta[:, :, t, None, None]
        forget = torch.eye(KEY, dtype=q.dtype) - beta_t * k_t @ k_t.transpose(-1, -2)
        memory = memory @ forget + beta_t * v_t @ k_t.transpose(-1, -2)
        expected = (memory @ q[:, :, t, :, None])[..., 0]
        actual = recurrent_delta_rule(q, k, v, beta, state)[0][:, :, t]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_equal_the_recurrence(tokens: int, with_state: bool) -> None:
    inputs = make_inputs(tokens)[: None if with_state else -1]
    for actual, expected in zip(delta_rule(*inputs), recurrent_delta_rule(*inputs), strict=True):
        assert actual.shape == expected.shape
        assert rms_ratio(actual, expected) < 1e-11


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_every_grouping_of_heads(heads: tuple[int, int]) -> None:
    inputs = make_inputs(40, heads)
    expected = recurrent_delta_rule(*inputs)[0]
    assert rms_ratio(delta_rule(*inputs)[0], expected) < 1e-11


@pytest.mark.parametrize("tokens", [1, 3, 33, 75])
def test_gradients_equal_the_recurrence(tokens: int) -> None:
    given = [x.requires_grad_() for x in make_inputs(tokens)]
    results = []
    for function in (delta_rule, recurrent_delta_rule):
        out, last = function(*given)
        results.append(torch.autograd.grad(out.sin().sum() + last.square().sum(), given))
    for actual, expected in zip(*results, strict=True):
        assert rms_ratio(actual, expected) < 1e-10


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_the_inverse_of_a_unit_lower_triangular_matrix(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(3, 2, size, size, generator=generator, dtype=torch.float64).tril(-1)
    product = chunked._unit_lower_inverse(lower) @ (lower + torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64).expand_as(product))


def test_any_split_hands_on_the_state() -> None:
    inputs = make_inputs(75)[:-1]
    whole, last = delta_rule(*inputs)
    state, parts = None, []
    for cut in zip(*(x.split([1, 33, 1, 40], dim=2) for x in inputs), strict=True):
        part, state = delta_rule(*cut, state)
        parts.append(part)
    assert state is not None
    assert rms_ratio(torch.cat(parts, dim=2), whole) < 1e-11
    assert rms_ratio(state, last) < 1e-11


def test_float32_is_as_exact_as_float32_can_be() -> None:
    exact = recurrent_delta_rule(*make_inputs(500))[0]
    rounded = delta_rule(*make_inputs(500, dtype=torch.float32))[0]
    assert rms_ratio(rounded.double(), exact) < 1e-5


def test_equal_keys_that_replace_everything_are_exact() -> None:
    # Powers of the matrix that is inverted would reach 1e8 here.
    q, k, v, beta, _ = make_inputs(100, dtype=torch.float32)
    k, beta = k[:, :, :1].expand_as(k), torch.ones_like(beta)
    expected = (q.unflatten(1, (2, 2)) * k[:, :, None]).sum(dim=-1, keepdim=True) * v[:, :, None]
    assert rms_ratio(delta_rule(q, k, v, beta)[0], expected.flatten(1, 2)) < 1e-5


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(40, dtype=torch.float32)
    expected = delta_rule(*inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_rule(*inputs)[0], expected)


def test_inputs_are_left_alone() -> None:
    for tokens in (1, 32):
        inputs = make_inputs(tokens)
        before = [x.clone() for x in inputs]
        delta_rule(*inputs)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
