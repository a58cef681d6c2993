"""Softmax attention with any number of query and key/value heads (MHA, GQA, MQA, SQA).

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, S cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.mixers.base import ProjectedMixer
from searchspace.positions import apply_rope


@dataclass
class KeyValueCache:
    """Keys and values of every token so far, in buffers of fixed size."""

    k_BGSK: Tensor
    v_BGSK: Tensor
    length: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the buffers."""
        return {"k": self.k_BGSK, "v": self.v_BGSK}

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return everything stored, as views."""
        end = self.length + k_BGTK.shape[2]
        if end > self.k_BGSK.shape[2]:
            raise ValueError(f"state holds {self.k_BGSK.shape[2]} tokens, {end} were given")
        self.k_BGSK[:, :, self.length : end] = k_BGTK
        self.v_BGSK[:, :, self.length : end] = v_BGTK
        self.length = end
        return self.k_BGSK[:, :, :end], self.v_BGSK[:, :, :end]


class SoftmaxAttention(ProjectedMixer):
    """Causal softmax attention.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA); Shazeer 2019 (MQA).
    """

    positions: ClassVar = ("rope", "nope")

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> KeyValueCache:
        """Return an empty cache for `max_tokens` tokens."""
        shape = (batch, self.spec.num_kv_heads, max_tokens, self.spec.head_dim)
        return KeyValueCache(torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    def forward(self, x_BTD: Tensor, state: KeyValueCache | None = None) -> Tensor:
        """Attend to every token up to and including the own one."""
        q, k, v = self.project_qkv(x_BTD)
        start = 0 if state is None else state.length
        if self.spec.position == "rope":
            q, k = apply_rope(q, start), apply_rope(k, start)
        if state is not None:
            k, v = state.append(k, v)
        return self.o_proj(self.merge_heads(causal_attention(q, k, v, start)))


def causal_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, start: int) -> Tensor:
    """Attend causally; query t stands at position `start + t` of the S keys."""
    tokens = q_BHTK.shape[2]
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if start == 0 or tokens == 1:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, is_causal=tokens > 1, enable_gqa=grouped
        )
    age_TS = key_age(start, tokens, k_BGSK.shape[2], q_BHTK.device)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=age_TS >= 0, enable_gqa=grouped
    )


def key_age(start: int, tokens: int, num_keys: int, device: torch.device) -> Tensor:
    """Return how many positions each of the S keys lies before each of the T queries (T, S)."""
    query_T1 = torch.arange(start, start + tokens, device=device)[:, None]
    return query_T1 - torch.arange(num_keys, device=device)[None, :]
