"""Linear attention mixers: a matrix-valued state instead of a growing cache.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K key (feature) width,
V value width, E = K or 1 features of the decay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nas_kernels.linear_attention import full_linear_attention, linear_attention
from searchspace.mixers.base import MixerState, ProjectedMixer
from searchspace.positions import apply_rope, position_kind

MIN_DENOMINATOR = 1e-6


@dataclass(kw_only=True)
class RecurrentState(MixerState):
    """The running sum of (decayed) key-value products of each key/value head.

    Args:
        sum_BGKV: its sum; after `RecurrentMixer.quotient` its last column is the sum of the keys.
    """

    sum_BGKV: Tensor


class RecurrentMixer(ProjectedMixer):
    """Base of the mixers whose state is a sum over tokens of `k v^T`."""

    fixed_state: ClassVar[bool] = True

    @property
    def key_width(self) -> int:
        """Rows of the state; the head width unless a feature map widens it."""
        return self.spec.head_dim

    @property
    def value_width(self) -> int:
        """Columns of the state; the head width unless a subclass carries more."""
        return self.spec.head_dim

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> RecurrentState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        shape = (batch, self.spec.num_kv_heads, self.key_width, self.value_width)
        return RecurrentState(
            sum_BGKV=torch.zeros(shape, device=device), conv_BTC=self.init_conv(batch, device)
        )

    def run(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTV: Tensor,
        log_decay_BGTE: Tensor | None,
        state: RecurrentState | None,
    ) -> Tensor:
        """Return (B, H, T, V): what the queries read from the sum of `k v^T`.

        The causal form goes on from `state`, which it updates and whose tokens it counts. The
        bidirectional form sums over all tokens; with a decay it is the mean of both directions.
        """
        if not self.causal:
            if log_decay_BGTE is None:
                return full_linear_attention(q_BHTK, k_BGTK, v_BGTV)
            return mean_of_directions(
                lambda *args: linear_attention(*args)[0], q_BHTK, k_BGTK, v_BGTV, log_decay_BGTE
            )
        before = state.sum_BGKV if state is not None and state.length else None
        out_BHTV, after = linear_attention(q_BHTK, k_BGTK, v_BGTV, log_decay_BGTE, before)
        if state is not None:
            state.sum_BGKV = after
            state.length += q_BHTK.shape[2]
        return out_BHTV

    def counts(self, x_BHTK: Tensor, state: RecurrentState | None) -> Tensor:
        """Return how many tokens each token's sum has, (T, 1); call it before `run`."""
        tokens = x_BHTK.shape[2]
        dtype = torch.promote_types(x_BHTK.dtype, torch.float32)
        if not self.causal:
            return torch.full(
                (tokens, 1), torch.sym_float(tokens), device=x_BHTK.device, dtype=dtype
            )
        start = 1 if state is None else state.length + 1
        return torch.arange(start, start + tokens, device=x_BHTK.device, dtype=dtype)[:, None]

    def rotate(self, x_BHTK: Tensor, state: RecurrentState | None) -> Tensor:
        """Apply the rotary embedding, if the spec asks for it, from the state's length on."""
        if position_kind(self.spec.position) != "rope":
            return x_BHTK
        return apply_rope(x_BHTK, 0 if state is None else state.length, self.spec.position)


@dataclass(kw_only=True)
class QuotientState(RecurrentState):
    """A state with the sum of the keys beside that of the products.

    Args:
        keys_BGK: the running sum of the feature-mapped keys.
    """

    keys_BGK: Tensor


class QuotientMixer(RecurrentMixer):
    """Base of the mixers that divide by a sum over tokens of `q k^T`, for features >= 0.

    A rotary embedding turns the features in the numerator only, which keeps the denominator
    positive.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equation 5; Su et al. 2021,
    "RoFormer", section 3.3, equation 19.
    """

    positions: ClassVar[tuple[str, ...]] = ("nope", "rope")

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> QuotientState:
        """Return the zero state; its size does not depend on `max_tokens`."""
        made = super().init_state(batch, max_tokens, device)
        return QuotientState(
            sum_BGKV=made.sum_BGKV,
            keys_BGK=made.sum_BGKV.new_zeros(made.sum_BGKV.shape[:3]),
            conv_BTC=made.conv_BTC,
        )

    def quotient(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, state: QuotientState | None
    ) -> Tensor:
        """Return `sum over s of (q_t k_s) v_s / sum over s of (q_t k_s)`, (B, H, T, V).

        Args:
            q_BHTK: queries after the feature map, >= 0.
            k_BGTK: keys after the feature map.
            v_BGTV: values.
            state: see `run`; None in the bidirectional form.
        """
        k_sum = k_BGTK.to(torch.promote_types(k_BGTK.dtype, torch.float32))
        k_sum = k_sum.cumsum(dim=2) if self.causal else k_sum.sum(dim=2, keepdim=True)
        if state is not None:
            if state.length:
                k_sum = k_sum + state.keys_BGK[:, :, None]
            state.keys_BGK = k_sum[:, :, -1]
        grouped = q_BHTK.unflatten(1, (k_BGTK.shape[1], -1))
        denominator = (grouped * k_sum[:, :, None]).sum(dim=-1, keepdim=True).flatten(1, 2)
        q_BHTK, k_BGTK = self.rotate(q_BHTK, state), self.rotate(k_BGTK, state)
        out_BHTV = self.run(q_BHTK, k_BGTK, v_BGTV, None, state)
        return out_BHTV / denominator.clamp_min(MIN_DENOMINATOR)


def mean_of_directions(run: Callable[..., Tensor], *inputs_BHT: Tensor) -> Tensor:
    """Return the mean of `run` forward and backward in time, both in one call.

    Args:
        run: maps tensors with time on axis 2 to one; sequences of a batch are independent.
        inputs_BHT: its arguments.
    """
    both = [torch.cat([x, x.flip(2)]) for x in inputs_BHT]
    forward, backward = run(*both).chunk(2)
    return (forward + backward.flip(2)) / 2
