"""FlexAttention, compiled, with and without a block mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.benchmarks._kernel_cases.case import Contender, Inputs, Setting

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Batch, head, query and key to whether the query sees the key."""


def flex_contender(setting: Setting, name: str, rule: Rule | None, **options: Any) -> Contender:
    """Return FlexAttention of `q`, `k` and `v`; the mask is made before the clock starts.

    Args:
        setting: where it runs.
        name: in tables.
        rule: who sees whom; None for all.
        options: of `flex_attention`.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        return flex_attention(q, k, v, block_mask=mask, **options)

    masks: dict[str, Any] = {}

    def build(fast: Any, given: Inputs) -> Any:
        q, k, v = given["q"], given["k"], given["v"]
        if rule is not None and "mask" not in masks:
            masks["mask"] = _block_mask(rule, q.shape[2], k.shape[2], str(q.device))
        return lambda: (fast(q, k, v, masks.get("mask")),)

    return setting.compiled(name, attend, build)


def _block_mask(rule: Rule, queries: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(rule, None, None, queries, keys, device=device)
