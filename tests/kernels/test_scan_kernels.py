"""The Triton kernels of `selective_scan` and `linear_scan`, which the interpreter scans slowly."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nas_kernels.linear_scan import linear_scan, recurrent_linear_scan
from nas_kernels.selective_scan import recurrent_selective_scan, selective_scan, step
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

from nas_kernels.linear_scan.launch import linear_scan_kernels
from nas_kernels.selective_scan.launch import selective_scan_kernels

CHANNELS, STATES = 5, 3


def make_inputs(tokens: int, batch: int = 1) -> list[Tensor]:
    return [
        draw(batch, tokens, CHANNELS, seed=0),
        draw(batch, tokens, CHANNELS, seed=1).exp() * 0.3,
        -draw(CHANNELS, STATES, seed=2).exp(),
        draw(batch, tokens, STATES, seed=3),
        draw(batch, tokens, STATES, seed=4),
        draw(batch, CHANNELS, STATES, seed=5),
    ]


def make_gates(tokens: int) -> list[Tensor]:
    decay = draw(2, tokens, CHANNELS, seed=1).sigmoid()
    decay[:, 1::5] = 0.0
    return [decay, draw(2, tokens, CHANNELS, seed=0), draw(2, CHANNELS, seed=2)]


def compare(inputs: list[Tensor], chunk: int | None) -> None:
    """Compare outputs, states and every gradient with those of the float64 recurrence."""
    run = partial(selective_scan_kernels, chunk=chunk)
    compare_with_float64(run, recurrent_selective_scan, inputs, None)


def test_outputs_and_gradients() -> None:
    compare(make_inputs(11, batch=2), chunk=4)


def test_several_blocks_of_channels() -> None:
    _, _, _, write, read, _ = make_inputs(3)
    x, delta = draw(1, 3, 35), draw(1, 3, 35, seed=1).exp() * 0.3
    inputs = [x, delta, -draw(35, STATES).exp(), write, read, draw(1, 35, STATES)]
    compare(inputs, chunk=4)


def test_strides_are_followed() -> None:
    x, delta, a, write, read, state = make_inputs(6)
    inputs = [in_wider_rows(x), delta.mT.contiguous().mT, a.mT.contiguous().mT, misaligned(write)]
    compare([*inputs, in_wider_rows(read), state.mT.contiguous().mT], chunk=4)


def test_bf16_inputs_are_computed_in_fp32() -> None:
    x, delta, a, write, read, state = make_inputs(6)
    narrow = [z.bfloat16() for z in (x, write, read)]
    compare([narrow[0], delta, a, *narrow[1:], state], chunk=4)


def test_steep_decays_stay_finite_and_exact() -> None:
    x, delta, a, write, read, state = make_inputs(8)
    compare([x, delta * 300.0, a, write, read, state], chunk=8)


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_and_single_tokens(tokens: int) -> None:
    inputs = make_inputs(tokens)
    if tokens == 0:
        out, last = selective_scan(*inputs, implementation="triton")
        assert out.shape == (1, 0, CHANNELS)
        assert_close(last, inputs[5])
        return
    for given in (inputs, inputs[:5]):
        results = selective_scan(*given, implementation="triton")
        for result, right in zip(results, recurrent_selective_scan(*wide(given)), strict=True):
            assert_close(result, right)
    compare(inputs, None)


def test_states_are_handed_on() -> None:
    x, delta, a, write, read, _ = make_inputs(10)
    whole, last = selective_scan_kernels(x, delta, a, write, read, None, 8)
    state, parts = None, []
    for start, end in [(0, 1), (1, 4), (4, 10)]:
        cut = [z[:, start:end] for z in (x, delta, write, read)]
        part, state = selective_scan(*cut[:2], a, *cut[2:], state, implementation="triton")
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), whole)
    assert_close(state, last)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_step_updates_in_place(implementation: str) -> None:
    x, delta, a, write, read, state = make_inputs(1, batch=2)
    x, write = x.bfloat16(), write.bfloat16()
    expected, after = recurrent_selective_scan(*wide([x, delta, a, write, read, state]))
    state = in_wider_rows(state)
    token = [in_wider_rows(z[:, 0]) for z in (x, delta)]
    out = step(*token, a, write[:, 0], read[:, 0], state, implementation=implementation)
    assert_close(out, expected[:, 0])
    assert_close(state, after)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs memory that is never touched")
def test_addresses_are_64_bit() -> None:
    x, delta, a, write, read, state = make_inputs(3)
    far = partial(far_apart, apart=2**30 + 8, dtype=torch.bfloat16)
    inputs = [far(x), far(delta), a, far(write), read, state]
    for result, right in zip(
        selective_scan_kernels(*inputs), recurrent_selective_scan(*wide(inputs)), strict=True
    ):
        assert result.dtype == torch.float32
        assert_close(result, right)
    decay = far(delta.sigmoid())
    states = linear_scan_kernels(decay, inputs[0], None)
    assert_close(states, recurrent_linear_scan(*wide([decay, inputs[0]]))[0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, delta, a, write, read, state = make_inputs(2)
    with pytest.raises(ValueError, match="delta has the shape"):
        selective_scan(x, delta[:, :, 1:], a, write, read, implementation="triton")
    with pytest.raises(ValueError, match="state has the shape"):
        selective_scan(x, delta, a, write, read, state[:, 1:], implementation="triton")
    decay, added, before = make_gates(2)
    with pytest.raises(ValueError, match="decay_BTC has the shape"):
        linear_scan(decay[:, :1], added, before, implementation="triton")


@pytest.mark.parametrize("with_state", [False, True])
def test_linear_scan_and_its_gradients(with_state: bool) -> None:
    inputs: list[Any] = make_gates(11)[: 3 if with_state else 2]
    inputs[0] = in_wider_rows(inputs[0])
    inputs[1] = inputs[1].mT.contiguous().mT
    if not with_state:
        inputs.append(None)

    def exact(*given: Tensor) -> Tensor:
        return recurrent_linear_scan(*given)[0]

    compare_with_float64(partial(linear_scan_kernels, chunk=4), exact, inputs, None)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_linear_scan_hands_on_the_state(tokens: int) -> None:
    inputs = [x.bfloat16() for x in make_gates(tokens)]
    out, last = linear_scan(*inputs, implementation="triton")
    assert (out.dtype, last.dtype) == (torch.float32, torch.float32)
    if tokens == 0:
        assert out.shape == (2, 0, CHANNELS)
        assert_close(last, inputs[2].float())
        return
    for result, right in zip((out, last), recurrent_linear_scan(*wide(inputs)), strict=True):
        assert_close(result, right)
