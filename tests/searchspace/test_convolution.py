from __future__ import annotations

import pytest
import torch
from torch import Tensor

from searchspace.convolution import causal_conv, depthwise_conv, outward_offsets


def by_loops(x_BTC: Tensor, weight_CW: Tensor, offsets: list[int]) -> Tensor:
    out = torch.zeros_like(x_BTC)
    for t in range(x_BTC.shape[1]):
        for tap, offset in enumerate(offsets):
            if 0 <= t + offset < x_BTC.shape[1]:
                out[:, t] += weight_CW[:, tap] * x_BTC[:, t + offset]
    return out


def tensors(taps: int, tokens: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(taps)
    x_BTC = torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)
    return x_BTC, torch.randn(3, taps, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
def test_both_forms_by_loops(taps: int) -> None:
    x_BTC, weight_CW = tensors(taps)
    back = [-tap for tap in range(taps)]
    torch.testing.assert_close(causal_conv(x_BTC, weight_CW)[0], by_loops(x_BTC, weight_CW, back))
    both = outward_offsets(taps)
    torch.testing.assert_close(depthwise_conv(x_BTC, weight_CW), by_loops(x_BTC, weight_CW, both))


def test_offsets_go_outward() -> None:
    assert outward_offsets(5) == [0, 1, -1, 2, -2]


@pytest.mark.parametrize("split", [[11], [1] * 11, [4, 1, 6]])
def test_calls_go_on_from_each_other(split: list[int]) -> None:
    x_BTC, weight_CW = tensors(4)
    before, outs = torch.zeros(2, 3, 3, dtype=torch.float64), []
    for part in x_BTC.split(split, dim=1):
        out, before = causal_conv(part, weight_CW, before)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), causal_conv(x_BTC, weight_CW)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_leading_taps_are_a_narrow_convolution(causal: bool) -> None:
    x_BTC, weight_CW = tensors(4)

    def convolve(weight: Tensor) -> Tensor:
        return causal_conv(x_BTC, weight)[0] if causal else depthwise_conv(x_BTC, weight)

    narrow = convolve(weight_CW[:, :2])
    weight_CW[:, 2:] = 0
    torch.testing.assert_close(convolve(weight_CW), narrow)


def test_the_tail_keeps_its_type_under_autocast() -> None:
    x_BTC, weight_CW = tensors(3)
    before = torch.zeros(2, 2, 3)
    assert causal_conv(x_BTC.bfloat16(), weight_CW.bfloat16(), before)[1].dtype == torch.float32
