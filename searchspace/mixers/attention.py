"""What mixers with attention scores share: positions, masks, the cache, sums over grouped heads.

Shapes: B batch, T query tokens, D d_model, H query heads, G key/value heads, S keys, K head width,
C channels, W taps of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.block_attention import block_obstacle
from nas_kernels.constants import cached_constant
from nas_kernels.dispatch import may_have_kernels, use_triton
from searchspace.convolution import causal_conv, depthwise_conv
from searchspace.mixers.base import MixerState, ProjectedMixer, SharedKV
from searchspace.mixers.kv_cache import KeyValueCache
from searchspace.positions import KINDS, alibi_bias, apply_rope, position_kind
from searchspace.specs import MixerSpec

QUERY_CHUNK = 128
QK_NORM_EPS = {"rmsnorm": 1e-5, "rmsnorm_e6": 1e-6}
QK_NORM_AXES: dict[str, tuple[str, ...]] = {"q_norm": ("head_dim",), "k_norm": ("head_dim",)}


class AttentionMixer(ProjectedMixer):
    """A mixer that weighs values by a function of query-key scores.

    A subclass implements `attend`; its causal form keeps all keys and values. Option `qk_norm`
    brings queries and keys of every head to unit root mean square, and scales each feature, before
    positions are applied.

    Source: Henry et al. 2020, "Query-Key Normalization for Transformers", section 3, in the form of
    Yang et al. 2025, "Qwen3 Technical Report", section 2 (RMS norm, one scale for all heads).
    """

    positions: ClassVar[tuple[str, ...]] = KINDS
    options: ClassVar[dict[str, Any]] = {"qk_norm": "none"}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"qk_norm": ("none", *QK_NORM_EPS)}

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.position = position_kind(spec.position)
        self.qk_norm = str(self.option("qk_norm"))
        if self.qk_norm != "none":
            self.q_norm = nn.Parameter(torch.empty(spec.head_dim))
            self.k_norm = nn.Parameter(torch.empty(spec.head_dim))

    @classmethod
    def param_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes, those of the query and key norms only where they are there."""
        norms = QK_NORM_AXES if cls.option_of(spec, "qk_norm") != "none" else {}
        return {**super().param_axes(spec), **norms}

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise; norms of queries and keys start without a scale."""
        super().reset(generator, depth)
        self.reset_qk_norm()

    def reset_qk_norm(self) -> None:
        """Set the scales of the norms that there are to 1."""
        with torch.no_grad():
            for name in QK_NORM_AXES:
                if hasattr(self, name):
                    getattr(self, name).fill_(1.0)

    def normalise(self, x_BHTK: Tensor, name: str) -> Tensor:
        """Apply ``"q_norm"`` or ``"k_norm"`` where the mixer has it."""
        if self.qk_norm == "none":
            return x_BHTK
        weight_K = getattr(self, name)
        full = x_BHTK.to(weight_K.dtype)
        return F.rms_norm(full, weight_K.shape, weight_K, QK_NORM_EPS[self.qk_norm]).to(x_BHTK)

    def project_qkv(
        self, x_BTD: Tensor, state: MixerState | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys (both normalised, where they are) and values."""
        q, k, v = super().project_qkv(x_BTD, state)
        return self.normalise(q, "q_norm"), self.normalise(k, "k_norm"), v

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> Any:
        """Return an empty cache for `max_tokens` tokens."""
        shape = (batch, self.spec.num_kv_heads, max_tokens, self.spec.head_dim)
        return KeyValueCache(
            k_BGSK=torch.zeros(shape, device=device),
            v_BGSK=torch.zeros(shape, device=device),
            conv_BTC=self.init_conv(batch, device),
        )

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Attend to the tokens given and, with a state, to those before."""
        start = 0 if state is None else state.length
        q, k, v = self.project_qkv(x_BTD, state)
        q, k = self.rotate(q, start), self.rotate(k, start)
        if state is not None:
            k, v = state.append(k, v)
        return self.o_proj(self.merge_heads(self.attend(q, k, v, start)))

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, start: int) -> Tensor:
        """Return (B, H, T, K); query t stands at position `start + t` of the S keys."""
        raise NotImplementedError

    def attend_whole(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Return (B, H, T, K) within a sequence from its first token on."""
        return self.attend(q_BHTK, k_BGTK, v_BGTK, 0)

    def attention_probs(self, x_BTD: Tensor, shared: SharedKV | None = None) -> Tensor | None:
        """Return the weights (B, H, T, T); a form without a softmax overrides this."""
        q, k, _ = self.project_qkv(x_BTD)
        tokens = x_BTD.shape[1]
        # A sum of weighted unit vectors is the row of weights, whatever way it is computed.
        unit_BGTT = torch.eye(tokens, dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return self.attend_whole(self.rotate(q, 0), self.rotate(k, 0), unit_BGTT)

    def rotate(self, x_BHTK: Tensor, start: int) -> Tensor:
        """Apply the rotary embedding where the mixer has one."""
        if self.position != "rope":
            return x_BHTK
        return apply_rope(x_BHTK, start, self.spec.position)

    def with_alibi(self, mask: Tensor | None, q_BHTK: Tensor, num_keys: int, start: int) -> Any:
        """Combine what hides keys with the linear bias of distances, where the mixer has one.

        Args:
            mask: true where a key is visible, (T, S), (H, T, S) or (1, H, T, S); None for all.
            q_BHTK: gives heads, tokens and device.
            num_keys: S.
            start: position of the first query.

        Returns:
            `mask`, or what is to be added to the scores, (1, H, T, S).
        """
        if self.position != "alibi":
            return mask
        heads, tokens = q_BHTK.shape[1:3]
        bias = alibi_bias(heads, tokens, num_keys, start, q_BHTK.device)[None]
        return bias if mask is None else bias.masked_fill(~mask, -math.inf)

    def full_mask(self, q_BHTK: Tensor, num_keys: int, start: int) -> Any:
        """Return `with_alibi` of the mask of a form that sees all, or all earlier, tokens."""
        mask, tokens = None, q_BHTK.shape[2]
        if self.causal and tokens > 1:
            mask = causal_mask(start, tokens, num_keys, q_BHTK.device)
        return self.with_alibi(mask, q_BHTK, num_keys, start)


def alibi_at(num_heads: int, query_T: Tensor, key_S: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the linear bias (1, H, T, S) for any positions, minus infinity where not visible."""
    slope_H = -alibi_bias(num_heads, 1, 2, 0, query_T.device)[:, 0, 1]
    bias = -slope_H[:, None, None] * (query_T[:, None] - key_S).abs()
    return (bias if mask is None else bias.masked_fill(~mask, -math.inf))[None]


def convolve_together(
    parts: list[Tensor], taps_CW: Tensor, causal: bool, state: MixerState | None
) -> list[Tensor]:
    """Convolve projections (B, T, C_i) over time, going on from `state.conv_BTC` where causal."""
    x_BTC, sizes = torch.cat(parts, dim=-1), [part.shape[-1] for part in parts]
    if not causal:
        return list(depthwise_conv(x_BTC, taps_CW).split(sizes, dim=-1))
    out_BTC, after = causal_conv(x_BTC, taps_CW, None if state is None else state.conv_BTC)
    if state is not None:
        state.conv_BTC = after
    return list(out_BTC.split(sizes, dim=-1))


def sdpa(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Softmax attention with grouped heads; `mask` as `AttentionMixer.with_alibi` returns it."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_BHTK.dtype)
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
    )


def runs_by_tiles(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> bool:
    """Whether `block_attention` has a kernel for these, which skips what no query sees."""
    given = q_BHTK, k_BGSK, v_BGSK
    return may_have_kernels(q_BHTK) and use_triton(
        "block_attention", *given, unsupported=block_obstacle(*given)
    )


def grouped_scores(q_BHTK: Tensor, k_BGSK: Tensor) -> Tensor:
    """Return `q k / sqrt(K)` as (B, H, T, S), in at least single precision."""
    groups, tokens = k_BGSK.shape[1], q_BHTK.shape[2]
    q = q_BHTK.unflatten(1, (groups, -1)).flatten(2, 3) / math.sqrt(q_BHTK.shape[-1])
    scores = q @ k_BGSK.transpose(-1, -2)
    return at_least_float(scores.unflatten(2, (-1, tokens)).flatten(1, 2))


def grouped_sum(weights_BHTS: Tensor, v_BGSK: Tensor) -> Tensor:
    """Return the values weighed, (B, H, T, K)."""
    groups, tokens = v_BGSK.shape[1], weights_BHTS.shape[2]
    weights = weights_BHTS.unflatten(1, (groups, -1)).flatten(2, 3).to(v_BGSK.dtype)
    return (weights @ v_BGSK).unflatten(2, (-1, tokens)).flatten(1, 2)


def in_query_chunks(
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    start: int,
    causal: bool,
) -> Tensor:
    """Attend with some queries at a time, in a causal form only to the keys up to the last of them.

    Scores that no fused kernel computes are then few enough to stay in a cache.

    Args:
        attend: takes queries, keys, values and the position of the first query; returns tokens
            on the axis before the last.
        q_BHTK: queries.
        k_BGSK: keys.
        v_BGSK: values.
        start: position of the first query.
        causal: whether queries see no later keys.
    """
    tokens, num_keys = q_BHTK.shape[2], k_BGSK.shape[2]
    if isinstance(tokens, torch.SymInt):
        # A graph for any number of tokens: how many chunks that makes is not known yet.
        return attend(q_BHTK, k_BGSK, v_BGSK, start)
    outs = []
    for at in range(0, tokens, QUERY_CHUNK):
        end = min(at + QUERY_CHUNK, tokens)
        seen = start + end if causal else num_keys
        outs.append(
            attend(q_BHTK[:, :, at:end], k_BGSK[:, :, :seen], v_BGSK[:, :, :seen], start + at)
        )
    return torch.cat(outs, dim=-2) if len(outs) > 1 else outs[0]


def at_least_float(x: Tensor) -> Tensor:
    """Widen 16-bit numbers to 32 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def apply_mask(scores_BHTS: Tensor, mask: Tensor | None) -> Tensor:
    """Hide keys by minus infinity or add a bias; `mask` as `with_alibi` returns it."""
    if mask is None:
        return scores_BHTS
    if mask.is_floating_point():
        return scores_BHTS + mask.to(scores_BHTS.dtype)
    return scores_BHTS.masked_fill(~mask, -math.inf)


def without_padding(mask: Tensor | None, visible_BS: Tensor | None) -> Tensor | None:
    """Combine a mask or bias (of any sequence) with which keys of each sequence are no padding."""
    if visible_BS is None:
        return mask
    visible_B11S = visible_BS[:, None, None]
    if mask is None:
        return visible_B11S
    if mask.is_floating_point():
        return mask.masked_fill(~visible_B11S, -math.inf)
    return mask & visible_B11S


def key_age(start: int, tokens: int, num_keys: int, device: torch.device) -> Tensor:
    """Return how many positions each of the S keys lies before each of the T queries (T, S)."""
    query_T1 = torch.arange(start, start + tokens, device=device)[:, None]
    return query_T1 - torch.arange(num_keys, device=device)[None, :]


@cached_constant
def causal_mask(start: int, tokens: int, num_keys: int, device: torch.device) -> Tensor:
    """Return true where a key is not newer than the query (T, S)."""
    return key_age(start, tokens, num_keys, device) >= 0
