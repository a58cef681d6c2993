"""Softmax attention to the tokens in a window around the own one.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, W window,
N blocks of W tokens, S keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nas_kernels.block_attention import Pattern, block_attention
from nas_kernels.constants import cached_constant
from nas_kernels.dispatch import TRITON
from searchspace.errors import UserError
from searchspace.mixers.attention import AttentionMixer, alibi_at, runs_by_tiles, sdpa
from searchspace.mixers.kv_cache import WindowCache
from searchspace.mixers.window_blocks import block_banded
from searchspace.specs import MixerSpec


class SlidingWindowAttention(AttentionMixer):
    """Softmax attention in which a token sees itself and `window - 1` others on a side.

    Those are `dilation` positions apart. The causal form sees only the side before the token, the
    bidirectional form both. The first `global_tokens` of the sequence are seen by every (later)
    token and, in the bidirectional form, see every token; they use the same projections as others.

    Without dilation and global tokens the work grows linearly with T; otherwise a whole call is a
    masked attention over T x T. A decode step is linear in the window in any case.

    Source: Beltagy et al. 2020, "Longformer", section 3.1.
    """

    ordered: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]] = {"window": 64, "global_tokens": 0, "dilation": 1}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.window = int(self.option("window"))
        self.num_global = int(self.option("global_tokens"))
        self.dilation = int(self.option("dilation"))
        self.reach = (self.window - 1) * self.dilation
        """How far away the farthest token in the window is."""

    @classmethod
    def check_options(cls, name: str, options: Mapping[str, Any]) -> None:
        """Raise a `UserError` for values that are not allowed; `global_tokens` may be 0."""
        num_global = options["global_tokens"]
        if type(num_global) is not int or num_global < 0:
            raise UserError(
                f"{name}.global_tokens={num_global!r} must be a whole number of at least 0"
            )
        super().check_options(name, {k: v for k, v in options.items() if k != "global_tokens"})

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> WindowCache:
        """Return an empty cache; it holds the tokens the window can reach, and the global ones."""

        def zeros(tokens: int) -> Tensor:
            shape = (batch, self.spec.num_kv_heads, tokens, self.spec.head_dim)
            return torch.zeros(shape, device=device)

        held, num_global = min(self.reach, max_tokens), min(self.num_global, max_tokens)
        return WindowCache(
            k_BGSK=zeros(held),
            v_BGSK=zeros(held),
            global_k_BGSK=zeros(num_global) if num_global else None,
            global_v_BGSK=zeros(num_global) if num_global else None,
            conv_BTC=self.init_conv(batch, device),
        )

    def forward(self, x_BTD: Tensor, state: WindowCache | None = None) -> Tensor:
        """Attend to the window, going on from the state where there is one."""
        start = 0 if state is None else state.length
        q, k, v = self.project_qkv(x_BTD, state)
        q, k = self.rotate(q, start), self.rotate(k, start)
        if state is None:
            out = self.attend(q, k, v, 0)
        else:
            stored = state.num_global, state.held
            k, v = state.extend(k, v)
            out = self.attend(q, k, v, 0) if start == 0 else self._go_on(q, k, v, start, *stored)
        return self.o_proj(self.merge_heads(out))

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, start: int) -> Tensor:
        """Attend within a sequence that starts at position 0, by the cheapest of the ways."""
        tokens, alibi = q_BHTK.shape[2], self.position == "alibi"
        banded = self.dilation == 1 and self.num_global == 0
        if banded and self.causal and tokens <= self.window and not alibi:
            return sdpa(q_BHTK, k_BGSK, v_BGSK, None, is_causal=tokens > 1)
        if not alibi and runs_by_tiles(q_BHTK, k_BGSK, v_BGSK):
            pattern = Pattern(self.causal, self.window, self.dilation, self.num_global)
            return block_attention(q_BHTK, k_BGSK, v_BGSK, pattern, implementation=TRITON)[0]
        if banded and tokens > 2 * self.window:
            return block_banded(q_BHTK, k_BGSK, v_BGSK, self.window, self.causal, alibi)
        mask = self._mask(0, tokens, 0, 0, q_BHTK.device)
        return sdpa(q_BHTK, k_BGSK, v_BGSK, self.with_alibi(mask, q_BHTK, tokens, 0))

    def _go_on(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, num_global: int, held: int
    ) -> Tensor:
        """Attend to what the state held before the call, and to the new tokens."""
        tokens, device = q.shape[2], q.device
        position_S = _key_positions(num_global, start - held, start + tokens, device)
        mask: Tensor | None = None
        if tokens == 1:
            # Only keys a whole number of dilations away, and none twice: no mask is needed.
            twice = torch.sym_max(0, num_global - (start - held)) if self.num_global else 0
            first = num_global + twice + (held - twice) % self.dilation
            k, v, position_S = (
                _first_and_every(x, num_global, first, self.dilation)
                for x in (k, v, position_S[None, None, :, None])
            )
            position_S = position_S.flatten()
        else:
            # Seen from the window, later starts look all the same.
            canonical = torch.sym_min(start, held + num_global)
            mask = self._mask(canonical, tokens, num_global, held, device)
        if self.position == "alibi":
            query_T = torch.arange(start, start + tokens, device=device)
            mask = alibi_at(q.shape[1], query_T, position_S, mask)
        return sdpa(q, k, v, mask)

    def _mask(
        self, start: int, tokens: int, num_global: int, held: int, device: torch.device
    ) -> Tensor:
        pattern = self.window, self.dilation, self.num_global, self.causal
        return _visible(pattern, start, tokens, num_global, held, device)


def _first_and_every(x_BGSK: Tensor, num_first: int, start: int, step: int) -> Tensor:
    """Return the first keys and, from `start` on, every `step`-th."""
    every = x_BGSK[:, :, start::step]
    return torch.cat([x_BGSK[:, :, :num_first], every], dim=2) if num_first else every


@cached_constant
def _key_positions(num_global: int, start: int, end: int, device: torch.device) -> Tensor:
    """Return the positions (S,) of stored global keys, then of those from `start` to `end`."""
    first = torch.arange(num_global, device=device)
    return torch.cat([first, torch.arange(start, end, device=device)])


@cached_constant
def _visible(
    pattern: tuple[int, int, int, bool],
    start: int,
    tokens: int,
    num_global: int,
    held: int,
    device: torch.device,
) -> Tensor:
    """Return which keys the queries from `start` on see, (T, S).

    Args:
        pattern: window, dilation, number of global tokens, and whether it is causal.
        start: position of the first query.
        tokens: T.
        num_global: keys of the sequence's first tokens that stand in front.
        held: keys of the tokens before `start`, which come next; those of the queries are last.
        device: where the mask is made.
    """
    window, dilation, all_global, causal = pattern
    query_T1 = torch.arange(start, start + tokens, device=device)[:, None]
    key_S = _key_positions(num_global, start - held, start + tokens, device)
    age_TS = query_T1 - key_S
    near_TS = (age_TS % dilation == 0) & (age_TS.abs() < window * dilation)
    visible_TS = near_TS | (key_S < all_global)
    visible_TS = visible_TS & (age_TS >= 0) if causal else visible_TS | (query_T1 < all_global)
    stored_S = torch.arange(key_S.shape[0], device=device) < num_global
    return visible_TS & (stored_S | (key_S >= num_global))
