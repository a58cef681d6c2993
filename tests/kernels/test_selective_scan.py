from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas_kernels.selective_scan import chunked, recurrent_selective_scan, selective_scan

BATCH, CHANNELS, STATES = 2, 5, 3
CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short inputs have several chunks."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", CHUNK * BATCH * CHANNELS * STATES)


def make_inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [
        draw(BATCH, tokens, CHANNELS),
        draw(BATCH, tokens, CHANNELS).exp() * 0.3,
        -draw(CHANNELS, STATES).exp(),
        draw(BATCH, tokens, STATES),
        draw(BATCH, tokens, STATES),
        draw(BATCH, CHANNELS, STATES),
    ]
    return [x.to(dtype) for x in inputs]


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_the_recurrent_reference_is_the_sum() -> None:
    x, delta, a, write, read, state = make_inputs(6)
    expected = torch.zeros_like(x)
    for t in range(6):
        for c in range(CHANNELS):
            for s in range(STATES):
                kept = (a[c, s] * delta[:, : t + 1, c].sum(dim=1)).exp()
                expected[:, t, c] += read[:, t, s] * kept * state[:, c, s]
                for u in range(t + 1):
                    kept = (a[c, s] * delta[:, u + 1 : t + 1, c].sum(dim=1)).exp()
                    stored = delta[:, u, c] * x[:, u, c] * write[:, u, s]
                    expected[:, t, c] += read[:, t, s] * kept * stored
    actual, _ = recurrent_selective_scan(x, delta, a, write, read, state)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tokens", [1, 2, CHUNK, CHUNK + 1, 37])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_equal_the_recurrence(tokens: int, with_state: bool) -> None:
    inputs = make_inputs(tokens)[: None if with_state else -1]
    for actual, expected in zip(
        selective_scan(*inputs), recurrent_selective_scan(*inputs), strict=True
    ):
        assert actual.shape == expected.shape
        assert rms_ratio(actual, expected) < 1e-12


@pytest.mark.parametrize("tokens", [1, 2, CHUNK + 1, 37])
def test_gradients_equal_the_recurrence(tokens: int) -> None:
    given = [x.requires_grad_() for x in make_inputs(tokens)]
    results = []
    for function in (selective_scan, recurrent_selective_scan):
        out, last = function(*given)
        results.append(torch.autograd.grad(out.sin().sum() + last.square().sum(), given))
    for actual, expected in zip(*results, strict=True):
        assert rms_ratio(actual, expected) < 1e-11


def test_gradcheck() -> None:
    given = [x.requires_grad_() for x in make_inputs(CHUNK + 2)]
    assert torch.autograd.gradcheck(selective_scan, given)


def test_one_chunk_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2**20)
    inputs = make_inputs(50)
    expected = recurrent_selective_scan(*inputs)[0]
    assert rms_ratio(selective_scan(*inputs)[0], expected) < 1e-12


def test_float32_is_as_exact_as_float32_can_be() -> None:
    exact = recurrent_selective_scan(*make_inputs(500))[0]
    rounded = selective_scan(*make_inputs(500, torch.float32))[0]
    assert rms_ratio(rounded.double(), exact) < 1e-5


def test_the_strongest_decay_stays_finite() -> None:
    x, delta, a, write, read, state = (x.float() for x in make_inputs(40))
    given = [z.requires_grad_() for z in (x, delta * 1e4, a * 1e3, write, read, state)]
    out, last = selective_scan(*given)
    # Whatever came before is forgotten.
    expected = given[0] * given[1] * (write * read).sum(dim=-1, keepdim=True)
    assert rms_ratio(out, expected) < 1e-5
    for grad in torch.autograd.grad(out.sum() + last.sum(), given):
        assert torch.isfinite(grad).all()


def test_inputs_are_left_alone() -> None:
    for tokens in (1, 20):
        inputs = make_inputs(tokens)
        before = [x.clone() for x in inputs]
        selective_scan(*(x.requires_grad_() for x in inputs))[0].sum().backward()
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
