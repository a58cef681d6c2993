"""Depthwise causal convolution over time, with its last inputs as state.

Taps are stored from the own token back: the own token's first, then those of the tokens 1, 2, ...
before. So the leading taps of a wide convolution are a narrow one, as weight sharing needs it.

Shapes: B batch, T tokens, C channels, W taps, P = W - 1 tokens before.
"""

from __future__ import annotations

from torch import Tensor

from nas_kernels.causal_conv.ref import causal_conv_reference
from nas_kernels.causal_conv.shifted import causal_conv as shifted_causal_conv
from nas_kernels.causal_conv.shifted import weighted_sum
from nas_kernels.dispatch import AUTO, may_have_kernels, use_triton
from nas_kernels.launching import check_shape
from nas_kernels.recurrence import recorded

__all__ = ["causal_conv", "causal_conv_reference", "weighted_sum"]

MAX_TAPS = 8
"""As many as the kernel takes."""


def causal_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    state_BPC: Tensor | None = None,
    bias_C: Tensor | None = None,
    silu: bool = False,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Compute `y_t = act(b + sum_i w_i x_(t-i))` for every channel.

    Args:
        x_BTC: the new tokens.
        weight_CW: taps, the own token's first.
        state_BPC: the W - 1 tokens before; None stands for zeros.
        bias_C: is added to the sums.
        silu: whether the activation is `silu`; else there is none.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Returns:
        The result (B, T, C), in the widest type of tokens, taps and bias, and what to hand over as
        `state_BPC` next time (B, P, C), as precise as before.

    Raises:
        ValueError: when shapes that might go to a kernel do not fit.

    Source: Gu and Dao 2023, "Mamba", section 3.4 (convolution and SiLU before the scan).
    """
    tensors = (x_BTC, weight_CW, state_BPC, bias_C)
    if implementation == AUTO and not may_have_kernels(x_BTC):
        return shifted_causal_conv(*tensors, silu)
    (batch, _, channels), taps = x_BTC.shape, weight_CW.shape[1]
    check_shape("weight_CW", weight_CW, (channels, taps))
    if state_BPC is not None:
        check_shape("state_BPC", state_BPC, (batch, taps - 1, channels))
    if bias_C is not None:
        check_shape("bias_C", bias_C, (channels,))
    reason = None
    if taps > MAX_TAPS:
        reason = f"it has {taps} taps and the kernel takes up to {MAX_TAPS}"
    elif recorded():
        reason = "it is recorded as a graph"
    if x_BTC.numel() and use_triton(
        "causal_conv", *tensors, implementation=implementation, unsupported=reason
    ):
        from nas_kernels.causal_conv.launch import causal_conv_kernels

        return causal_conv_kernels(*tensors, silu)
    return shifted_causal_conv(*tensors, silu)
