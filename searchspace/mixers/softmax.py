"""Softmax attention with any number of query and key/value heads (MHA, GQA, MQA, SQA).

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nas_kernels.decode_attention import decode_attention, decode_obstacle
from nas_kernels.dispatch import TRITON, may_have_kernels, use_triton
from searchspace.convolution import reset_conv
from searchspace.errors import UserError
from searchspace.linear import Linear, project
from searchspace.mixers.attention import (
    QK_NORM_AXES,
    AttentionMixer,
    apply_mask,
    convolve_together,
    grouped_scores,
    grouped_sum,
    in_query_chunks,
    sdpa,
    without_padding,
)
from searchspace.mixers.base import (
    CONV_AXES,
    Mixer,
    MixerState,
    SharedKV,
)
from searchspace.mixers.kv_cache import BorrowedCache, KeyValueCache
from searchspace.specs import MixerSpec


class SoftmaxAttention(AttentionMixer):
    """Softmax attention to all tokens, or to all up to the own one.

    Option `qk`: ``"symmetric"`` has no query projection, queries are the keys of their group;
    ``"collapsed"`` has one (D, D) matrix W per head in place of both, with scores
    `(W x_t) x_s / sqrt(D)`, so that its keys are the input itself. Option `vo`: ``"identity"`` has
    no value and output matrices, values are the input and the heads' results are averaged.
    Convolutions of `qkv_dconv` stand behind those projections that are there.

    Option `similarity`: ``"weighted"`` (weighted multiplicative attention) puts a learned (K, K)
    matrix W_a per query head into the scores, `q W_a k / sqrt(K)`. It stands between the queries
    (convolved, where they are) and their positions, so that a rotary embedding still depends on
    distances alone, and keys are cached, shared and grouped as they are without it. It starts near
    the identity, and stays in floating point at any precision.

    With `kv_shared` keys and values are those of an earlier layer; queries are then not convolved,
    which would need a state.

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA); Shazeer 2019 (MQA);
    Bermeitinger et al. 2024, "Reducing the Transformer Architecture to a Minimum", section 3 (`qk`,
    `vo`); Luong et al. 2015, "Effective Approaches to Attention-based Neural Machine Translation",
    equation 8 ("general"), and Tuli et al. 2022, "FlexiBERT", section 3.1 and table 1
    (`similarity`); Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer
    Attention", section 2.2 (`kv_shared`).
    """

    shares_kv: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]] = {"qk": "separate", "vo": "separate", "similarity": "dot"}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "qk": ("separate", "symmetric", "collapsed"),
        "vo": ("separate", "identity"),
        "similarity": ("dot", "weighted"),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        if spec.kv_shared and self.option("qk") == "symmetric":
            raise UserError(
                "kv_shared with qk='symmetric' leaves a layer without queries of its own; choose "
                "qk='separate' or 'collapsed'"
            )
        self.collapsed = self.option("qk") == "collapsed"
        self.identity = self.option("vo") == "identity"
        there = self._projections(spec)
        for part in "qkvo":
            if part not in there:
                delattr(self, f"{part}_proj")
        if self.collapsed:
            # One module per head: a smaller d_model cuts each matrix, not the row of matrices.
            self.qk_collapsed = nn.ModuleList(
                Linear(spec.d_model, spec.d_model, spec.precision) for _ in range(spec.num_heads)
            )
        self.weighted = self.option("similarity") == "weighted"
        if self.weighted:
            shape = (spec.num_heads, spec.head_dim, spec.head_dim)
            self.qk_weighted = nn.Parameter(torch.empty(shape))
        self.projected = [part for part in "qkv" if part in there]
        self.convolved = [] if spec.kv_shared or not self.num_taps else self.projected
        for name in CONV_AXES:
            if self.num_taps and name[0] not in self.convolved:
                delattr(self, name)
        for name in QK_NORM_AXES:
            if self.qk_norm != "none" and name[0] not in there:
                delattr(self, name)

    @classmethod
    def _projections(cls, spec: MixerSpec) -> set[str]:
        """Return which of the four projections there are."""
        there, qk = set("qkvo"), cls.option_of(spec, "qk")
        if qk == "symmetric":
            there -= {"q"}
        if qk == "collapsed":
            there -= {"q", "k"}
        if cls.option_of(spec, "vo") == "identity":
            there -= {"v", "o"}
        return there - {"k", "v"} if spec.kv_shared else there

    @classmethod
    def param_axes(cls, spec: MixerSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes of the parameters that the options leave."""
        there = cls._projections(spec)
        found = {**cls.axes, **cls.bias_axes(spec)}
        if cls.option_of(spec, "qk_norm") != "none":
            found |= QK_NORM_AXES
        if cls.option_of(spec, "qkv_dconv") and not spec.kv_shared:
            found |= CONV_AXES
        axes = {name: named for name, named in found.items() if name[0] in there}
        if cls.option_of(spec, "qk") == "collapsed":
            for head in range(spec.num_heads):
                axes[f"qk_collapsed.{head}.weight"] = ("d_model", "d_model")
        if cls.option_of(spec, "similarity") == "weighted":
            axes["qk_weighted"] = ("num_heads", "head_dim", "head_dim")
        return axes

    @classmethod
    def check_options(cls, name: str, options: Mapping[str, Any]) -> None:
        """Raise a `UserError` for values that are not allowed, or not together."""
        super().check_options(name, options)
        if options["qk"] == "collapsed" and options["qkv_dconv"]:
            raise UserError(
                f"{name}.qkv_dconv={options['qkv_dconv']} with qk='collapsed' has no query and key "
                "projections to stand behind; set qkv_dconv=0 or qk='separate'"
            )
        if options["qk"] == "collapsed" and options["similarity"] == "weighted":
            raise UserError(
                f"{name}.similarity='weighted' with qk='collapsed' puts a matrix behind one that "
                "is free already; set similarity='dot' or qk='separate'"
            )

    @classmethod
    def settle_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options without what belongs to projections that are not there."""
        settled = dict(options)
        collapsed, identity = options["qk"] == "collapsed", options["vo"] == "identity"
        if identity and options["bias"] != "none":
            settled["bias"] = "none" if collapsed else "qkv"
        if collapsed:
            settled |= {"qkv_dconv": 0, "similarity": "dot", "qk_norm": "none"}
        return settled

    @classmethod
    def head_kind(cls, options: Mapping[str, Any]) -> Literal["grouped", "equal", "none"]:
        """Return ``"equal"`` where keys and values both are the input, one for all heads."""
        both = options["qk"] == "collapsed" and options["vo"] == "identity"
        return "equal" if both else cls.heads

    @classmethod
    def can_share_kv(cls, options: Mapping[str, Any]) -> bool:
        """Whether queries are a map of their own, which a layer without keys still has."""
        return bool(options["qk"] != "symmetric")

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise what is there; collapsed matrices as the other input maps."""
        Mixer.reset(self, generator, depth)
        for linear in self.qk_collapsed if self.collapsed else ():
            assert isinstance(linear, Linear)
            linear.reset(generator)
        for part in self.convolved:
            taps_CW = getattr(self, f"{part}_conv")
            reset_conv(taps_CW, generator)
        self.reset_qk_norm()
        if self.weighted:
            width = self.spec.head_dim
            with torch.no_grad():
                self.qk_weighted.normal_(0.0, 0.1 / math.sqrt(width), generator=generator)
                self.qk_weighted.diagonal(dim1=1, dim2=2).add_(1.0)

    def input_linears(self) -> list[Linear]:
        """Return all input maps; none where keys or values are the input itself."""
        own_input = (self.collapsed or self.identity) and not self.spec.kv_shared
        return [] if own_input else self._input_maps()

    def _input_maps(self) -> list[Linear]:
        maps = [getattr(self, f"{part}_proj") for part in self.projected]
        return maps + (list(self.qk_collapsed) if self.collapsed else [])

    def output_linear(self) -> Linear | None:
        """Return the output projection, where there is one."""
        return None if self.identity else self.o_proj

    def init_conv(self, batch: int, device: torch.device | None = None) -> Tensor | None:
        """Return the empty history of the convolutions that are there."""
        if not self.convolved:
            return None
        width = sum(getattr(self, f"{part}_conv").shape[0] for part in self.convolved)
        return torch.zeros(batch, self.num_taps - 1, width, device=device)

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> KeyValueCache | BorrowedCache:
        """Return an empty cache for `max_tokens` tokens."""
        k_BGSK, v_BGSK = self._zeros(batch, max_tokens, device=device)
        if self.spec.kv_shared:
            return BorrowedCache(k_BGSK=k_BGSK, v_BGSK=v_BGSK)
        one_buffer = self.collapsed and self.identity and self.position != "rope"
        return KeyValueCache(
            k_BGSK=k_BGSK,
            v_BGSK=None if one_buffer else v_BGSK,
            conv_BTC=self.init_conv(batch, device),
        )

    def _zeros(self, batch: int, tokens: int, **factory: Any) -> tuple[Tensor, Tensor]:
        """Return zero keys and values; those that are the input count as one head of width D."""
        projected, whole = (self.spec.num_kv_heads, self.spec.head_dim), (1, self.spec.d_model)
        (k_heads, k_width) = whole if self.collapsed else projected
        (v_heads, v_width) = whole if self.identity else projected
        return (
            torch.zeros(batch, k_heads, tokens, k_width, **factory),
            torch.zeros(batch, v_heads, tokens, v_width, **factory),
        )

    def forward(
        self,
        x_BTD: Tensor,
        state: KeyValueCache | BorrowedCache | None = None,
        shared: SharedKV | None = None,
    ) -> Tensor:
        """Attend to all visible tokens.

        Args:
            x_BTD: the input.
            state: gone on from and updated in place.
            shared: filled with keys and values of all tokens; with `kv_shared` read instead. A
                `kv_shared` layer without it attends to zeros.
        """
        q, k, v = self._project(x_BTD, state)
        if isinstance(state, BorrowedCache) or self.spec.kv_shared:
            k, v, start = self._borrow(x_BTD, state, shared)
        else:
            start = 0 if state is None else state.length
            k = self.rotate(k, start)
            if state is not None:
                k, v = state.append(k, v)
            if shared is not None:
                shared.k_BGSK, shared.v_BGSK, shared.start = k, v, start
        visible_BS = None if shared is None else shared.visible_BS
        out = self.attend(self.rotate(q, start), k, v, start, visible_BS)
        return out if self.identity else self.o_proj(self.merge_heads(out))

    def _project(self, x_BTD: Tensor, state: MixerState | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, H, T, K or D) and, unless borrowed, k and v (B, G or 1, T, K or D)."""
        outs = project(x_BTD, *self._input_maps())
        num_projected = len(self.projected)
        parts = dict(zip(self.projected, self._convolve(outs[:num_projected], state), strict=True))
        heads = {part: self.split_heads(out) for part, out in parts.items()}
        k, v = heads.get("k", x_BTD[:, None]), heads.get("v", x_BTD[:, None])
        if "k" in heads:
            k = self.normalise(k, "k_norm")
        if self.collapsed:
            return torch.stack(outs[num_projected:], dim=1), k, v
        if "q" not in heads:
            q = k.repeat_interleave(self.spec.num_heads // k.shape[1], dim=1)
        else:
            q = self.normalise(heads["q"], "q_norm")
        return q @ self.qk_weighted if self.weighted else q, k, v

    def _convolve(self, parts: list[Tensor], state: MixerState | None) -> list[Tensor]:
        if not self.convolved:
            return parts
        taps_CW = torch.cat([getattr(self, f"{part}_conv") for part in self.convolved])
        return convolve_together(parts, taps_CW, self.causal, state)

    def _borrow(
        self, x_BTD: Tensor, state: Any, shared: SharedKV | None
    ) -> tuple[Tensor, Tensor, int]:
        """Return keys, values and the position of the first query."""
        if shared is not None and shared.k_BGSK is not None and shared.v_BGSK is not None:
            return shared.k_BGSK, shared.v_BGSK, shared.start
        batch, tokens = x_BTD.shape[:2]
        if state is None:
            return *self._zeros(batch, tokens, device=x_BTD.device, dtype=x_BTD.dtype), 0
        start = state.length
        k, v = state.take(tokens)
        return k.to(x_BTD.dtype), v.to(x_BTD.dtype), start

    def attend(
        self,
        q_BHTK: Tensor,
        k_BGSK: Tensor,
        v_BGSK: Tensor,
        start: int,
        visible_BS: Tensor | None = None,
    ) -> Tensor:
        """Return (B, H, T, K), or (B, T, D) where the heads' results are averaged."""
        if self.collapsed or self.identity:
            wide = partial(self._attend_wide, visible_BS=visible_BS)
            return in_query_chunks(wide, q_BHTK, k_BGSK, v_BGSK, start, self.causal)
        if self.causal and start == 0 and q_BHTK.shape[2] > 1 and self.position != "alibi":
            return sdpa(q_BHTK, k_BGSK, v_BGSK, None, is_causal=True)
        if visible_BS is None and self._decodes(q_BHTK, k_BGSK, v_BGSK):
            return decode_attention(q_BHTK, k_BGSK, v_BGSK, implementation=TRITON)
        mask = without_padding(self.full_mask(q_BHTK, k_BGSK.shape[2], start), visible_BS)
        return sdpa(q_BHTK, k_BGSK, v_BGSK, mask)

    def _decodes(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> bool:
        """Whether one new token attends by a kernel that cuts its keys among programs."""
        given = q_BHTK, k_BGSK, v_BGSK
        if not may_have_kernels(q_BHTK) or q_BHTK.shape[2] != 1 or self.position == "alibi":
            return False
        return use_triton("decode_attention", *given, unsupported=decode_obstacle(*given))

    def _attend_wide(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, visible_BS: Tensor | None
    ) -> Tensor:
        """Attend where keys, values or both are the input, one for all heads."""
        weights = self._weights(q, k, start, visible_BS)
        if self.identity:
            # Averaging the weights, not the results, sums over the wide values once.
            return weights.mean(dim=1).to(v.dtype) @ v[:, 0]
        return grouped_sum(weights, v)

    def _weights(
        self, q: Tensor, k: Tensor, start: int, visible_BS: Tensor | None = None
    ) -> Tensor:
        mask = without_padding(self.full_mask(q, k.shape[2], start), visible_BS)
        return apply_mask(grouped_scores(q, k), mask).softmax(dim=-1)

    def attention_probs(self, x_BTD: Tensor, shared: SharedKV | None = None) -> Tensor | None:
        """Return the weights (B, H, T, S); with `kv_shared` those of the keys in `shared`."""
        q, k, _ = self._project(x_BTD, None)
        k = self._borrow(x_BTD, None, shared)[0] if self.spec.kv_shared else self.rotate(k, 0)
        visible_BS = None if shared is None else shared.visible_BS
        return self._weights(self.rotate(q, 0), k, 0, visible_BS)
