"""ReLU linear attention beside a depthwise convolution of the values.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, C = G K
channels, W taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.convolution import causal_conv, depthwise_conv
from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import QuotientMixer, QuotientState
from searchspace.specs import MixerSpec


@dataclass(kw_only=True)
class SlabState(QuotientState):
    """The sums, and the last values for the convolution.

    Args:
        values_BTC: of the W - 1 tokens before.
    """

    values_BTC: Tensor


class SlabAttention(QuotientMixer):
    """Linear attention with the feature map relu(x), plus a depthwise convolution of the values.

    Query heads of a group share the convolution of their values. The rotary embedding is left out:
    it could make the numerator large where a denominator of rectified features is zero.

    Source: Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and
    Progressive Re-parameterized Batch Normalization" (simplified linear attention).
    """

    positions: ClassVar[tuple[str, ...]] = ("nope",)
    ordered: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]] = {**QuotientMixer.options, "taps": 5}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        **QuotientMixer.option_choices,
        "taps": (3, 5, 7),
    }
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "slab_conv": ("num_kv_heads*head_dim", "taps"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        width = spec.num_kv_heads * spec.head_dim
        self.slab_conv = nn.Parameter(torch.empty(width, int(self.option("taps"))))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; the convolution draws from a normal of standard deviation 1 / W."""
        super().reset(generator, depth)
        with torch.no_grad():
            self.slab_conv.normal_(0.0, 1.0 / self.slab_conv.shape[1], generator=generator)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> SlabState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        made, (width, taps) = super().init_state(batch, max_tokens, device), self.slab_conv.shape
        values_BTC = torch.zeros(batch, taps - 1, width, device=device)
        return SlabState(**vars(made), values_BTC=values_BTC)

    def forward(self, x_BTD: Tensor, state: SlabState | None = None) -> Tensor:
        """Attend to every token up to and including the own one; bidirectional: to every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        near_BGTK = self.split_heads(self._convolve(self.merge_heads(v), state))
        out = self.quotient(F.relu(q), F.relu(k), v, state)
        out = (out.unflatten(1, (v.shape[1], -1)) + near_BGTK[:, :, None]).flatten(1, 2)
        return self.o_proj(self.merge_heads(out))

    def _convolve(self, v_BTC: Tensor, state: SlabState | None) -> Tensor:
        if not self.causal:
            return depthwise_conv(v_BTC, self.slab_conv)
        out, after = causal_conv(v_BTC, self.slab_conv, None if state is None else state.values_BTC)
        if state is not None:
            state.values_BTC = after
        return out
