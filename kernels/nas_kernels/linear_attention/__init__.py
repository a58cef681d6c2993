"""Linear attention, causal with an optional decay, or bidirectional.

`linear_attention` and `step` run as Triton kernels on a GPU, else in PyTorch.

Shapes: B batch, H query heads, G key/value heads, T tokens, K key width, V value width, E = K or 1
features of the decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.launching import as_autocast, check_heads, check_shape, check_written
from nas_kernels.linear_attention.chunked import MIN_LOG_DECAY, full_linear_attention
from nas_kernels.linear_attention.chunked import linear_attention as chunked_linear_attention
from nas_kernels.linear_attention.latent import latent_attention
from nas_kernels.linear_attention.ref import recurrent_linear_attention
from nas_kernels.recurrence import recorded

__all__ = [
    "full_linear_attention",
    "latent_attention",
    "linear_attention",
    "recurrent_linear_attention",
    "step",
]


def linear_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    log_decay_BGTE: Tensor | None = None,
    state_BGKV: Tensor | None = None,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_linear_attention` in chunks; same arguments and results.

    A decay per feature is clamped to `MIN_LOG_DECAY` per token. Under autocast matrices are
    multiplied in its type; sums and states are kept in fp32.

    Args:
        q_BHTK: queries.
        k_BGTK: keys.
        v_BGTV: values.
        log_decay_BGTE: <= 0, per key feature or one per head; None means no decay.
        state_BGKV: the state before the first token; None means zeros.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes that go to a kernel do not fit.

    Source: Yang et al. 2023, "Gated Linear Attention Transformers", section 4 (chunkwise form);
    Dao and Gu 2024, "Transformers are SSMs", section 6 (decay per head).
    """
    inputs = (q_BHTK, k_BGTK, v_BGTV, log_decay_BGTE, state_BGKV)
    empty = any(x.numel() == 0 for x in (q_BHTK, v_BGTV))
    reason = "it is recorded as a graph" if recorded() else None
    if empty or not use_triton(
        "linear_attention", *inputs, implementation=implementation, unsupported=reason
    ):
        return chunked_linear_attention(*inputs)
    from nas_kernels.linear_attention.launch import linear_attention_kernels, step_kernel

    check_heads(q_BHTK, k_BGTK, v_BGTV, state_BGKV)
    _check_decay(log_decay_BGTE, k_BGTK)
    if q_BHTK.shape[2] > 1 or wants_gradient(*inputs):
        return linear_attention_kernels(*inputs)
    shape = (*k_BGTK.shape[:2], k_BGTK.shape[3], v_BGTV.shape[3])
    last = torch.empty(shape, device=k_BGTK.device, dtype=torch.float32)
    decay = None if log_decay_BGTE is None else log_decay_BGTE[:, :, 0]
    q, k, v = (x[:, :, 0] for x in as_autocast(q_BHTK, k_BGTK, v_BGTV))
    return step_kernel(q, k, v, decay, state_BGKV, last)[:, :, None], last


def step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    log_decay_BGE: Tensor | None,
    state_BGKV: Tensor,
    *,
    implementation: str = AUTO,
) -> Tensor:
    """Process one token: update `state_BGKV` in place and return what the queries read (B, H, V).

    On a GPU this is one launch for all heads and sequences. It has no gradient.

    Args:
        q_BHK: queries; head h reads the state of key/value head `h // (H / G)`.
        k_BGK: keys.
        v_BGV: values.
        log_decay_BGE: <= 0, per key feature (clamped as in `linear_attention`) or one per head.
        state_BGKV: is changed.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes do not fit, or numbers of the state share memory.

    Source: Katharopoulos et al. 2020, equations 16-20; Yang et al. 2023 (GLA), equation 3.
    """
    inputs = (q_BHK, k_BGK, v_BGV, log_decay_BGE, state_BGKV)
    check_heads(q_BHK, k_BGK, v_BGV, state_BGKV)
    check_written("state_BGKV", state_BGKV)
    _check_decay(log_decay_BGE, k_BGK)
    with torch.no_grad():
        if state_BGKV.numel() and use_triton(
            "linear_attention.step", *inputs, implementation=implementation
        ):
            from nas_kernels.linear_attention.launch import step_kernel

            return step_kernel(q_BHK, k_BGK, v_BGV, log_decay_BGE, state_BGKV, state_BGKV)
        q, k, v = (x[:, :, None] for x in (q_BHK, k_BGK, v_BGV))
        decay = None
        if log_decay_BGE is not None:
            lowest = MIN_LOG_DECAY if log_decay_BGE.shape[-1] > 1 else -torch.inf
            decay = log_decay_BGE[:, :, None].clamp_min(lowest)
        out, after = chunked_linear_attention(q, k, v, decay, state_BGKV)
        state_BGKV.copy_(after)
        return out[:, :, 0]


def _check_decay(log_decay: Tensor | None, k: Tensor) -> None:
    if log_decay is not None:
        width = 1 if log_decay.shape[-1] == 1 else k.shape[-1]
        check_shape("log_decay", log_decay, (*k.shape[:-1], width))
