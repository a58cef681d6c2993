"""Linear attention whose state is corrected by the delta rule.

`delta_rule` and `step` run as Triton kernels on a GPU, else in PyTorch.

Shapes: B batch, H query heads, G key/value heads, T tokens, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.delta_rule.chunked import delta_rule as chunked_delta_rule
from nas_kernels.delta_rule.ref import recurrent_delta_rule
from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.launching import check_heads, check_shape, check_written
from nas_kernels.precision import at_least_fp32
from nas_kernels.recurrence import recorded

__all__ = ["delta_rule", "recurrent_delta_rule", "step"]

MAX_KEY_WIDTH = 256
"""The kernel holds whole columns of a state in registers."""


def delta_rule(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    beta_BGT: Tensor,
    state_BGKV: Tensor | None = None,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_delta_rule` in chunks; same arguments, results in fp32 or wider.

    Autocast changes nothing: errors of one token's correction go into all later ones. Only where
    queries, keys and values are all bf16 does the kernel multiply in bf16, with sums in fp32.

    Args:
        q_BHTK: queries.
        k_BGTK: keys, of length 1.
        v_BGTV: values.
        beta_BGT: share of what is stored under the key that the value replaces, in [0, 1].
        state_BGKV: the state before the first token; None means zeros.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes that go to a kernel do not fit.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length", equations 8-11 (chunkwise UT form).
    """
    inputs = (q_BHTK, k_BGTK, v_BGTV, beta_BGT, state_BGKV)
    if q_BHTK.shape[2] == 0:
        return _no_tokens(q_BHTK, v_BGTV, state_BGKV)
    empty = any(x.numel() == 0 for x in (q_BHTK, v_BGTV))
    if empty or not use_triton(
        "delta_rule", *inputs, implementation=implementation, unsupported=_obstacle(k_BGTK)
    ):
        return chunked_delta_rule(*inputs)
    from nas_kernels.delta_rule.launch import delta_rule_kernels, step_kernel

    check_heads(q_BHTK, k_BGTK, v_BGTV, state_BGKV)
    check_shape("beta_BGT", beta_BGT, tuple(k_BGTK.shape[:3]))
    if q_BHTK.shape[2] > 1 or wants_gradient(*inputs):
        return delta_rule_kernels(*inputs)
    shape = (*k_BGTK.shape[:2], k_BGTK.shape[3], v_BGTV.shape[3])
    last = torch.empty(shape, device=k_BGTK.device, dtype=torch.float32)
    q, k, v, beta = (x[:, :, 0] for x in (q_BHTK, k_BGTK, v_BGTV, beta_BGT))
    return step_kernel(q, k, v, beta, state_BGKV, last)[:, :, None], last


def step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    beta_BG: Tensor,
    state_BGKV: Tensor,
    *,
    implementation: str = AUTO,
) -> Tensor:
    """Process one token: update `state_BGKV` in place and return what the queries read (B, H, V).

    On a GPU this is one launch for all heads and sequences. It has no gradient.

    Args:
        q_BHK: queries; head h reads the state of key/value head `h // (H / G)`.
        k_BGK: keys, of length 1.
        v_BGV: values.
        beta_BG: see `delta_rule`.
        state_BGKV: is changed.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes do not fit, or numbers of the state share memory.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length", section 2.2.
    """
    inputs = (q_BHK, k_BGK, v_BGV, beta_BG, state_BGKV)
    check_heads(q_BHK, k_BGK, v_BGV, state_BGKV)
    check_shape("beta_BG", beta_BG, tuple(k_BGK.shape[:2]))
    check_written("state_BGKV", state_BGKV)
    with torch.no_grad():
        if state_BGKV.numel() and use_triton(
            "delta_rule.step",
            *inputs,
            implementation=implementation,
            unsupported=_obstacle(k_BGK),
        ):
            from nas_kernels.delta_rule.launch import step_kernel

            return step_kernel(q_BHK, k_BGK, v_BGV, beta_BG, state_BGKV, state_BGKV)
        q, k, v, beta = (x[:, :, None] for x in (q_BHK, k_BGK, v_BGV, beta_BG))
        out, after = chunked_delta_rule(q, k, v, beta, state_BGKV)
        state_BGKV.copy_(after)
        return out[:, :, 0]


def _obstacle(k: Tensor) -> str | None:
    if k.shape[-1] > MAX_KEY_WIDTH:
        return f"its keys have {k.shape[-1]} features and the kernel takes up to {MAX_KEY_WIDTH}"
    return "it is recorded as a graph" if recorded() else None


def _no_tokens(q: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    v = at_least_fp32(v)
    if state is None:
        state = v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1])
    return v.new_empty(*q.shape[:3], v.shape[-1]), state.to(v.dtype)
