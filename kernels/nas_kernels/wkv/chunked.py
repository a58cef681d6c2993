"""The parallel form: a scan of numerators and denominators relative to a running peak.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nas_kernels.linear_scan import linear_scan
from nas_kernels.precision import at_least_fp32
from nas_kernels.recurrence import MAX, in_two_levels, recorded

WKVState = tuple[Tensor, Tensor, Tensor]
"""Numerator and denominator (B, C), both times e^-peak, and the peak (B, C)."""
Sums = tuple[Tensor, Tensor, Tensor]
"""The same for every token, (B, T, C) each."""


def wkv(
    k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, bonus_C: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Compute `recurrent_wkv` with a parallel scan; same arguments and results.

    The running peak, the largest logarithm so far, decays like the weights. It only scales
    numerator and denominator alike, so it takes no part in the gradient. Every exponential is
    taken of a number that is not positive. 16-bit inputs are computed in fp32.

    Source: Peng et al. 2023, "RWKV", equation 16, and appendix D (numerically stable form).
    """
    k, v, decay, bonus = (at_least_fp32(x) for x in (k_BTC, v_BTC, decay_C, bonus_C))
    before, after = _sums_before(k, v, decay, state)
    return _mean([before, _own(k, v, bonus)]), after


def bidirectional_wkv(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, bonus_C: Tensor) -> Tensor:
    """Return the mean over the tokens on both sides, weighted by distance as in `wkv`.

    Source: Duan et al. 2024, "Vision-RWKV", equation 4, with decays per token, not per 1/T.
    """
    k, v, decay, bonus = (at_least_fp32(x) for x in (k_BTC, v_BTC, decay_C, bonus_C))
    k_both, v_both = (torch.cat([x, x.flip(1)]) for x in (k, v))
    sums, _ = _sums_before(k_both, v_both, decay, None)
    earlier, later = zip(*(x.chunk(2) for x in sums), strict=True)
    return _mean([earlier, tuple(x.flip(1) for x in later), _own(k, v, bonus)])


def _own(k_BTC: Tensor, v_BTC: Tensor, bonus_C: Tensor) -> Sums:
    return v_BTC, torch.ones_like(v_BTC), k_BTC + bonus_C


def _mean(parts: list[Sums]) -> Tensor:
    """Return the quotient of the sums of all numerators and denominators."""
    with torch.no_grad():
        top = functools.reduce(torch.maximum, [peak for _, _, peak in parts])
    scales = [(peak - top).exp() for _, _, peak in parts]
    nums = [num * scale for (num, _, _), scale in zip(parts, scales, strict=True)]
    dens = [den * scale for (_, den, _), scale in zip(parts, scales, strict=True)]
    return functools.reduce(torch.add, nums) / functools.reduce(torch.add, dens)


def _sums_before(
    k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, state: WKVState | None
) -> tuple[Sums, WKVState]:
    """Return what the tokens before each one amount to, and the state after the last."""
    if state is None:
        zero_BC = torch.zeros_like(v_BTC[:, 0])
        state = (zero_BC, zero_BC, torch.full_like(zero_BC, -torch.inf))
    peak = _running_peak(k_BTC.detach(), decay_C.detach(), state[2])
    peak_before = torch.cat([state[2][:, None], peak[:, :-1]], dim=1)
    kept = (peak_before - decay_C - peak).exp()
    weight = (k_BTC - peak).exp()
    # Numerators and denominators decay alike: one scan for both.
    first = torch.cat(state[:2], dim=-1)
    added = torch.cat([weight * v_BTC, weight], dim=-1)
    sums, last = linear_scan(torch.cat([kept, kept], dim=-1), added, first)
    sums = torch.cat([first[:, None], sums[:, :-1]], dim=1)
    num, den = sums.chunk(2, dim=-1)
    last_num, last_den = last.chunk(2, dim=-1)
    return (num, den, peak_before), (last_num, last_den, peak[:, -1].clone())


@torch.no_grad()
def _running_peak(k_BTC: Tensor, decay_C: Tensor, peak_BC: Tensor) -> Tensor:
    """Return `max over i <= t of k_i - (t - i) w` by doubling distances, (B, T, C)."""
    if recorded() and k_BTC.shape[1] != 1:
        return in_two_levels(MAX, -decay_C[None, None], k_BTC, peak_BC)
    first = torch.maximum(k_BTC[:, 0], peak_BC - decay_C)
    peak = torch.cat([first[:, None], k_BTC[:, 1:]], dim=1)
    distance = 1
    while distance < peak.shape[1]:
        moved = torch.maximum(peak[:, distance:], peak[:, :-distance] - distance * decay_C)
        peak = torch.cat([peak[:, :distance], moved], dim=1)
        distance *= 2
    return peak
