"""Attention of one or a few new tokens to a long cache: split-KV decoding."""

from __future__ import annotations

from torch import Tensor

from nas_kernels.decode_attention.ref import decode_attention_ref
from nas_kernels.dispatch import AUTO, use_triton, wants_gradient

__all__ = ["decode_attention", "decode_attention_ref", "decode_obstacle"]


def decode_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    length_B: Tensor | int | None = None,
    *,
    window: int | None = None,
    first_tokens: int = 0,
    scale: float | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """Return what the last T tokens of each sequence get from keys up to their own, (B, H, T, V).

    The kernel cuts the keys into parts which programs attend to side by side, so that one sequence
    with few heads occupies a whole GPU. Inference only: where a gradient is wanted, PyTorch runs.

    Args:
        q_BHTK: queries; token t of sequence b stands at position `length_B[b] - T + t`.
        k_BGSK: keys by position; a cache may have more slots than are used. G divides H.
        v_BGSV: values, of any width.
        length_B: tokens of each sequence in the cache, the new ones included; int for all
            sequences, S by default and at most. How many parts there are depends on S: with a
            tensor, cut a cache with many unused slots (a view will do).
        window: how many positions a token sees, its own included; all by default.
        first_tokens: positions at the start that every token sees whatever the window.
        scale: of the scores; `1 / sqrt(K)` by default.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes do not fit.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference" (parts of the keys side by
    side); Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1.
    """
    _check(q_BHTK, k_BGSK, v_BGSV, window)
    scale = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(length_B, int):
        used = max(length_B, 0)
        k_BGSK, v_BGSV, length_B = k_BGSK[:, :, :used], v_BGSV[:, :, :used], None
    given = (q_BHTK, k_BGSK, v_BGSV)
    if use_triton(
        "decode_attention",
        *given,
        length_B,
        implementation=implementation,
        unsupported=decode_obstacle(*given),
    ):
        from nas_kernels.decode_attention import triton_kernel

        return triton_kernel.decode_attention(*given, length_B, window, first_tokens, scale)
    return decode_attention_ref(*given, length_B, window, first_tokens, scale)


def decode_obstacle(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor) -> str | None:
    """Return why the kernel cannot take these, for `use_triton`; None where it can."""
    if wants_gradient(q_BHTK, k_BGSK, v_BGSV):
        return "it has no gradient"
    return "heads are wider than 256" if max(q_BHTK.shape[-1], v_BGSV.shape[-1]) > 256 else None


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not "
            "fit: (B, H, T, K), (B, G, S, K) and (B, G, S, V) with G dividing H are needed"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None")
