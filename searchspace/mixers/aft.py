"""Attention free transformers: what they have in common, and AFT-full.

Every form is, per channel, an average of the values with weights `exp(key + position bias)`. Keys
and biases are clamped to +-30 before the exponential: the sums then fit float32 as they are. A
maximum to subtract would depend on later tokens, or on the pair of tokens *and* the channel.

Shapes: B batch, T tokens, D d_model, C inner channels, S tokens so far, E sums side by side (of
weighted values, of weights), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from searchspace.linear import project
from searchspace.mixers._bounded import require_room
from searchspace.mixers.base import ATTENTION_AXES, MixerState, ProjectedMixer
from searchspace.specs import MixerSpec

LIMIT = 30.0
BIAS_STD = 0.1
"""Of the factors of position biases."""


@dataclass(kw_only=True)
class AftCache(MixerState):
    """Weighted values and weights, `exp(k) v` and `exp(k)`, of every token so far."""

    by_position: ClassVar = frozenset({"sums_BSE"})

    sums_BSE: Tensor

    def append(self, new_BTE: Tensor) -> Tensor:
        """Store new tokens and return those of all."""
        start, self.length = self.length, self.length + new_BTE.shape[1]
        self.sums_BSE[:, start : self.length] = new_BTE
        return self.sums_BSE[:, : self.length]


def bounded_exp(x: Tensor) -> Tensor:
    """Return the exponential of `x` clamped to +-30, in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-LIMIT, LIMIT).exp()


def weigh(k: Tensor, v: Tensor) -> Tensor:
    """Return `exp(k) v` and `exp(k)` side by side on the last axis."""
    weight = bounded_exp(k)
    return torch.cat([weight * v, weight], dim=-1)


def average(sums: Tensor, value_width: int) -> Tensor:
    """Divide the sums of weighted values by the sums of weights."""
    return sums[..., :value_width] / sums[..., value_width:]


class FactorisedAft(ProjectedMixer):
    """Base of the forms whose position biases are `w[t, s] = u[t] . v[s]`."""

    heads: ClassVar = "equal"
    ordered: ClassVar = True
    bounded: ClassVar = True
    options: ClassVar[dict[str, Any]] = {**ProjectedMixer.options, "rank": 64}
    axes: ClassVar = {
        **ATTENTION_AXES,
        "aft_query_position": ("max_tokens", "rank"),
        "aft_key_position": ("max_tokens", "rank"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        rank = int(self.option("rank"))
        self.aft_query_position = nn.Parameter(torch.empty(spec.max_tokens, rank))
        self.aft_key_position = nn.Parameter(torch.empty(spec.max_tokens, rank))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; position biases start small."""
        super().reset(generator, depth)
        for factor_TR in (self.aft_query_position, self.aft_key_position):
            nn.init.normal_(factor_TR, 0.0, BIAS_STD, generator=generator)

    def project_qkv_flat(
        self, x_BTD: Tensor, state: MixerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, T, C)."""
        q, k, v = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        return self.convolve_qkv(q, k, v, state)


class AftFull(FactorisedAft):
    """`y_t = sigmoid(q_t) * sum_s exp(k_s + w[t, s]) v_s / sum_s exp(k_s + w[t, s])`.

    Source: Zhai et al. 2021, "An Attention Free Transformer", equation 2, with the factorised
    position biases of section 3.2, "Parameterization" (rank 128 there).
    """

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> AftCache:
        """Return an empty cache for `max_tokens` tokens."""
        width = 2 * self.spec.num_heads * self.spec.head_dim
        return AftCache(
            conv_BTC=self.init_conv(batch, device),
            sums_BSE=torch.zeros(batch, max_tokens, width, device=device),
        )

    def forward(self, x_BTD: Tensor, state: AftCache | None = None) -> Tensor:
        """Average values, of all tokens or those so far.

        Raises:
            UserError: for more tokens than `spec.max_tokens`.
        """
        start = 0 if state is None else state.length
        end = start + x_BTD.shape[1]
        require_room(self.spec, end)
        q_BTC, k_BTC, v_BTC = self.project_qkv_flat(x_BTD, state)
        sums_BSE = weigh(k_BTC, v_BTC)
        if state is not None:
            sums_BSE = state.append(sums_BSE)
        factor_RS = self.aft_key_position[:end].t()
        weight_TS = bounded_exp(self.aft_query_position[start:end] @ factor_RS)
        if self.causal:
            weight_TS = weight_TS.tril(start)
        out_BTC = average(weight_TS @ sums_BSE, q_BTC.shape[-1])
        return self.o_proj(torch.sigmoid(q_BTC) * out_BTC)
