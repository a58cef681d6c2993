"""Softmax attention to the last `window` tokens.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, W window,
N blocks of W tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels.constants import cached_constant
from searchspace.mixers.base import ProjectedMixer
from searchspace.mixers.softmax import key_age
from searchspace.positions import apply_rope
from searchspace.specs import MixerSpec


@dataclass
class WindowCache:
    """Keys (already rotated) and values of the last `window - 1` tokens at most."""

    k_BGSK: Tensor
    v_BGSK: Tensor
    length: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the buffers."""
        return {"k": self.k_BGSK, "v": self.v_BGSK}


class SlidingWindowAttention(ProjectedMixer):
    """Causal softmax attention in which a token sees itself and the `window - 1` before it.

    Source: Beltagy et al. 2020, "Longformer", section 3.1 (causal form).
    """

    positions: ClassVar = ("rope", "nope")
    options: ClassVar[dict[str, Any]] = {"window": 64}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.window = int(dict(spec.options)["window"])

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> WindowCache:
        """Return an empty cache; it never holds more than `window - 1` tokens."""
        held = min(self.window - 1, max_tokens)
        shape = (batch, self.spec.num_kv_heads, held, self.spec.head_dim)
        return WindowCache(torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    def forward(self, x_BTD: Tensor, state: WindowCache | None = None) -> Tensor:
        """Attend to the last `window` tokens, the own one included."""
        q, k, v = self.project_qkv(x_BTD)
        start = 0 if state is None else state.length
        if self.spec.position == "rope":
            q, k = apply_rope(q, start), apply_rope(k, start)
        if state is None:
            return self.o_proj(self.merge_heads(window_attention(q, k, v, self.window)))
        return self.o_proj(self.merge_heads(self._continue(q, k, v, state)))

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, state: WindowCache) -> Tensor:
        held = min(state.length, state.k_BGSK.shape[2])
        k = torch.cat([state.k_BGSK[:, :, state.k_BGSK.shape[2] - held :], k], dim=2)
        v = torch.cat([state.v_BGSK[:, :, state.v_BGSK.shape[2] - held :], v], dim=2)
        tokens, room = q.shape[2], min(state.k_BGSK.shape[2], k.shape[2])
        if room:
            # The newest keys stand at the end of the buffer, whatever its fill.
            state.k_BGSK = _keep_last(state.k_BGSK, k, room)
            state.v_BGSK = _keep_last(state.v_BGSK, v, room)
        state.length += tokens
        if held == 0 and tokens > 1:
            return window_attention(q, k, v, self.window)
        mask = None
        if tokens > 1:
            age_TS = key_age(held, tokens, k.shape[2], q.device)
            mask = (age_TS >= 0) & (age_TS < self.window)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _keep_last(buffer_BGSK: Tensor, new_BGUK: Tensor, room: int) -> Tensor:
    if room == buffer_BGSK.shape[2]:
        return new_BGUK[:, :, -room:]
    buffer_BGSK[:, :, -room:] = new_BGUK[:, :, -room:]
    return buffer_BGSK


def window_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int) -> Tensor:
    """Attend within the window, by the cheapest of three equal ways."""
    tokens, grouped = q_BHTK.shape[2], q_BHTK.shape[1] != k_BGTK.shape[1]
    if tokens <= window:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped
        )
    if tokens <= 2 * window:
        mask_TT = _band_mask(tokens, tokens, 0, window, q_BHTK.device)
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask_TT, enable_gqa=grouped
        )
    return _block_banded(q_BHTK, k_BGTK, v_BGTK, window)


@cached_constant
def _band_mask(
    num_queries: int, num_keys: int, start: int, window: int, device: torch.device
) -> Tensor:
    age = key_age(start, num_queries, num_keys, device)
    return (age >= 0) & (age < window)


def _block_banded(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int) -> Tensor:
    """Each block of W queries attends to its own and the previous block of keys."""
    batch, heads, tokens, dim = q_BHTK.shape
    num_blocks = -(-tokens // window)
    tail = num_blocks * window - tokens

    def blocks(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, tail)) if tail else x
        return padded.unflatten(2, (num_blocks, window)).transpose(1, 2)  # (B, N, heads, W, K)

    def with_previous(x: Tensor) -> Tensor:
        own = blocks(x)
        previous = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
        return torch.cat([previous, own], dim=3).flatten(0, 1)

    mask = _block_mask(num_blocks, window, q_BHTK.device)
    mask = mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        blocks(q_BHTK).flatten(0, 1),
        with_previous(k_BGTK),
        with_previous(v_BGTK),
        attn_mask=mask,
        enable_gqa=heads != k_BGTK.shape[1],
    )
    out = out.unflatten(0, (batch, num_blocks)).transpose(1, 2)
    return out.reshape(batch, heads, num_blocks * window, dim)[:, :, :tokens]


@cached_constant
def _block_mask(num_blocks: int, window: int, device: torch.device) -> Tensor:
    """Return (N, 1, W, 2W); the first block has no previous one."""
    mask = _band_mask(window, 2 * window, window, window, device).repeat(num_blocks, 1, 1, 1)
    mask[0, :, :, :window] = False
    return mask
