"""Softmax attention to a fixed sparse pattern of tokens.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nas_kernels.constants import cached_constant
from searchspace.errors import UserError
from searchspace.mixers.attention import AttentionMixer, alibi_at, sdpa

Pattern = Callable[..., Tensor]
"""Which of the keys (1, S) the queries (T, 1) see, by position: (T, S); causality comes on top."""


class SparseAttention(AttentionMixer):
    """Base of the mixers with a pattern of visible positions.

    All heads use the union of the factorised patterns (the paper's "merged head"), so any number
    of heads sees the same. A whole call is a masked attention over T x T; a decode step reads only
    the visible keys, though the cache keeps all.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 5.2.
    """

    ordered: ClassVar[bool] = True
    pattern: ClassVar[Pattern]

    def sizes(self) -> tuple[int, ...]:
        """Return the numbers that the pattern takes."""
        raise NotImplementedError

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, start: int) -> Tensor:
        """Attend to the visible keys."""
        tokens, num_keys, device = q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK.device
        what = type(self).pattern, self.sizes(), self.causal
        # Which keys those are cannot be part of a graph for any number of them.
        picks = tokens == 1 and num_keys > 1 and not isinstance(num_keys, torch.SymInt)
        if picks and self.causal:
            key_S = _visible_keys(*what, start, device)
            bias = None
            if self.position == "alibi":
                query_T = torch.full((1,), start, device=device)
                bias = alibi_at(q_BHTK.shape[1], query_T, key_S)
            return sdpa(q_BHTK, k_BGSK[:, :, key_S], v_BGSK[:, :, key_S], bias)
        mask = _visible(*what, start, tokens, num_keys, device)
        return sdpa(q_BHTK, k_BGSK, v_BGSK, self.with_alibi(mask, q_BHTK, num_keys, start))


def strided_pattern(query_T1: Tensor, key_1S: Tensor, stride: int) -> Tensor:
    """See the `stride` positions beside the own one, and every `stride`-th of all."""
    age_TS = query_T1 - key_1S
    return (age_TS.abs() <= stride) | (age_TS % stride == 0)


def fixed_pattern(query_T1: Tensor, key_1S: Tensor, stride: int, summary: int) -> Tensor:
    """See the own block of `stride` positions, and the last `summary` of every block."""
    return (query_T1 // stride == key_1S // stride) | (key_1S % stride >= stride - summary)


class StridedAttention(SparseAttention):
    """Attention to the last `stride` tokens and to every `stride`-th one.

    The bidirectional form sees both sides.

    Source: Child et al. 2019, section 4.3, strided attention, `A^(1)` and `A^(2)`.
    """

    pattern = staticmethod(strided_pattern)
    options: ClassVar[dict[str, Any]] = {"stride": 64}

    def sizes(self) -> tuple[int, ...]:
        """Return the stride."""
        return (int(self.option("stride")),)


class FixedAttention(SparseAttention):
    """Attention to the own block of `stride` tokens and to the last `summary` of all blocks.

    Source: Child et al. 2019, section 4.3, fixed attention; `summary` is the paper's c.
    """

    pattern = staticmethod(fixed_pattern)
    options: ClassVar[dict[str, Any]] = {"stride": 64, "summary": 4}

    @classmethod
    def check_options(cls, name: str, options: Mapping[str, Any]) -> None:
        """Raise a `UserError` for values that are not allowed."""
        super().check_options(name, options)
        if options["summary"] > options["stride"]:
            raise UserError(
                f"{name}.summary={options['summary']} is more than a block of stride="
                f"{options['stride']} tokens; choose at most {options['stride']}"
            )

    def sizes(self) -> tuple[int, ...]:
        """Return the block and what of it is seen by all."""
        return int(self.option("stride")), int(self.option("summary"))


@cached_constant
def _visible(
    pattern: Pattern,
    sizes: tuple[int, ...],
    causal: bool,
    start: int,
    tokens: int,
    num_keys: int,
    device: torch.device,
) -> Tensor:
    query_T1 = torch.arange(start, start + tokens, device=device)[:, None]
    key_1S = torch.arange(num_keys, device=device)[None, :]
    visible_TS = pattern(query_T1, key_1S, *sizes)
    return visible_TS & (query_T1 >= key_1S) if causal else visible_TS


@cached_constant
def _visible_keys(
    pattern: Pattern, sizes: tuple[int, ...], causal: bool, position: int, device: torch.device
) -> Tensor:
    """Return the positions that one query sees, ascending."""
    # On the CPU: how many there are must be known without waiting for a device.
    row = _visible(pattern, sizes, causal, position, 1, position + 1, torch.device("cpu"))
    return row[0].nonzero().flatten().to(device)
