"""Span-based dynamic convolution: every token weighs its neighbours by taps it computes itself.

Shapes: B batch, T tokens, D d_model, H heads, K head width, C = H K inner channels, W taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.convolution import causal_conv, depthwise_conv, outward_offsets, reset_conv
from searchspace.linear import Linear, project
from searchspace.mixers._windows import sides
from searchspace.mixers.attention import at_least_float
from searchspace.mixers.base import ATTENTION_AXES, Mixer, MixerState
from searchspace.specs import MixerSpec


@dataclass(kw_only=True)
class DynamicConvState(MixerState):
    """The last W - 1 inputs (`conv_BTC`, D wide), which spans reach back to, and their values.

    Args:
        values_BTC: of the W - 1 tokens before, C wide.
    """

    values_BTC: Tensor


class DynamicConv(Mixer):
    """A convolution of the values whose taps are, for each token and head, softmax(W_f (q * k)).

    The query `q` is a map of the own token; the span key `k` is a depthwise separable convolution
    of the input, of as many taps, so that the same token gets other taps in other surroundings.
    `W_f` reads all heads. In the causal form spans and taps look back only. Outside the sequence
    values are zero, but taps that point there take part in the softmax. Taps are stored by distance
    (see `searchspace.convolution`).

    Source: Jiang et al. 2020, "ConvBERT: Improving BERT with Span-based Dynamic Convolution",
    section 3.2, equations 4-6; Tuli et al. 2022, "FlexiBERT", section 3.1 and table 1, where it
    has 5 or 9 taps.
    """

    heads: ClassVar = "equal"
    ordered: ClassVar = True
    fixed_state: ClassVar = True
    options: ClassVar[dict[str, Any]] = {"taps": 9}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"taps": (3, 5, 7, 9, 15)}
    axes: ClassVar = {
        "q_proj.weight": ATTENTION_AXES["q_proj.weight"],
        "v_proj.weight": ("num_heads*head_dim", "d_model"),
        "o_proj.weight": ATTENTION_AXES["o_proj.weight"],
        "dynconv_span": ("d_model", "taps"),
        "dynconv_key.weight": ("num_heads*head_dim", "d_model"),
        "dynconv_kernel": ("num_heads", "taps", "num_heads*head_dim"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width, taps = spec.num_heads * spec.head_dim, int(self.option("taps"))
        self.q_proj = Linear(spec.d_model, width, spec.precision)
        self.v_proj = Linear(spec.d_model, width, spec.precision)
        self.o_proj = Linear(width, spec.d_model, spec.precision)
        self.dynconv_span = nn.Parameter(torch.empty(spec.d_model, taps))
        self.dynconv_key = Linear(spec.d_model, width, spec.precision)
        # With an axis of its own for taps, fewer of them are a leading slice, in every head.
        self.dynconv_kernel = nn.Parameter(torch.empty(spec.num_heads, taps, width))

    def output_linear(self) -> Linear | None:
        """Return the output projection."""
        return self.o_proj

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the span key starts near a map of the own token alone."""
        super().reset(generator, depth)
        reset_conv(self.dynconv_span, generator)
        with torch.no_grad():
            std = 1.0 / math.sqrt(self.dynconv_kernel.shape[-1])
            self.dynconv_kernel.normal_(0.0, std, generator=generator)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> DynamicConvState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        _, taps, width = self.dynconv_kernel.shape
        return DynamicConvState(
            conv_BTC=torch.zeros(batch, taps - 1, self.spec.d_model, device=device),
            values_BTC=torch.zeros(batch, taps - 1, width, device=device),
        )

    def forward(self, x_BTD: Tensor, state: DynamicConvState | None = None) -> Tensor:
        """Weigh the values of the tokens around each one, or up to each one."""
        q_BTC, v_BTC = project(x_BTD, self.q_proj, self.v_proj)
        k_BTC = self.dynconv_key(self._spans(x_BTD, state))
        logits_BTL = F.linear(q_BTC * k_BTC, self.dynconv_kernel.flatten(0, 1))
        logits_BTHW = at_least_float(logits_BTL).unflatten(-1, (self.spec.num_heads, -1))
        kernel_BTHW = logits_BTHW.softmax(dim=-1).to(v_BTC.dtype)
        padded_BTC = self._padded(v_BTC, state)
        if state is not None:
            state.length += x_BTD.shape[1]
        padded_BTHK = padded_BTC.unflatten(-1, (self.spec.num_heads, -1))
        return self.o_proj(lightweight_conv(padded_BTHK, kernel_BTHW, self.causal).flatten(2))

    def _spans(self, x_BTD: Tensor, state: DynamicConvState | None) -> Tensor:
        """Convolve the input, going on from the state."""
        if not self.causal:
            return depthwise_conv(x_BTD, self.dynconv_span)
        before = None if state is None else state.conv_BTC
        out_BTD, after = causal_conv(x_BTD, self.dynconv_span, before)
        if state is not None:
            state.conv_BTC = after
        return out_BTD

    def _padded(self, v_BTC: Tensor, state: DynamicConvState | None) -> Tensor:
        """Return the values with those around them that the taps reach, (B, T + W - 1, C)."""
        taps = self.dynconv_kernel.shape[1]
        if state is None:
            return F.pad(v_BTC, (0, 0, *sides(taps, self.causal)))
        padded_BTC = torch.cat([state.values_BTC.to(v_BTC.dtype), v_BTC], dim=1)
        kept_as = torch.promote_types(state.values_BTC.dtype, v_BTC.dtype)
        # A copy, so that the state does not keep whole prompts alive.
        state.values_BTC = padded_BTC[:, v_BTC.shape[1] :].to(kept_as, copy=True)
        return padded_BTC


def lightweight_conv(padded_BTHK: Tensor, kernel_BTHW: Tensor, causal: bool) -> Tensor:
    """Weigh the tokens around each one with taps of its own, which a head's channels share.

    Args:
        padded_BTHK: the tokens with those before and after them that the taps reach,
            (B, T + W - 1, H, K).
        kernel_BTHW: taps of every token, the own token's first, then outward.
        causal: whether they look back only; else to both sides in turn.

    Returns:
        The sums (B, T, H, K).
    """
    tokens, taps = kernel_BTHW.shape[1], kernel_BTHW.shape[3]
    before, _ = sides(taps, causal)
    if causal and tokens == 1:
        kernel_BWH1 = kernel_BTHW.flip(-1).permute(0, 3, 2, 1)
        return (padded_BTHK * kernel_BWH1).sum(dim=1, keepdim=True)
    offsets = range(0, -taps, -1) if causal else outward_offsets(taps)
    # Sums of shifted copies: two to five times as fast as products with unfolded windows.
    out = padded_BTHK[:, before : before + tokens] * kernel_BTHW[..., :1]
    for tap, offset in enumerate(offsets):
        if tap:
            near_BTHK = padded_BTHK[:, before + offset : before + offset + tokens]
            out = torch.addcmul(out, near_BTHK, kernel_BTHW[..., tap : tap + 1])
    return out
