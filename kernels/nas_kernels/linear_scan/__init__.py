"""First-order linear recurrences: `h_t = a_t h_{t-1} + b_t`, channel by channel.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from torch import Tensor

from nas_kernels.dispatch import AUTO, use_triton
from nas_kernels.launching import check_shape
from nas_kernels.linear_scan.chunked import linear_scan as chunked_linear_scan
from nas_kernels.linear_scan.ref import recurrent_linear_scan
from nas_kernels.precision import at_least_fp32
from nas_kernels.recurrence import recorded

__all__ = ["linear_scan", "recurrent_linear_scan"]


def linear_scan(
    decay_BTC: Tensor,
    input_BTC: Tensor,
    state_BC: Tensor | None = None,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_linear_scan` in chunks; same arguments, results in fp32 or wider.

    Only products of decays occur, never a quotient or an exponential, so nothing overflows for
    decays in [0, 1] and a decay of zero is exact.

    Args:
        decay_BTC: factors of the state before, in [0, 1].
        input_BTC: what is added.
        state_BC: h before the first token; None means zeros.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes that go to a kernel do not fit.

    Source: Blelloch 1990, "Prefix Sums and Their Applications", section 1.4; Martin and Cundy 2018,
    "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", section 2.2 (the gradient).
    """
    inputs = (decay_BTC, input_BTC, state_BC)
    batch, tokens, channels = input_BTC.shape
    if tokens == 0:
        x = at_least_fp32(input_BTC)
        return x, x.new_zeros(batch, channels) if state_BC is None else state_BC.to(x.dtype)
    reason = "it is recorded as a graph" if recorded() else None
    # One token is one operation in PyTorch as well.
    if (
        tokens == 1
        or not input_BTC.numel()
        or not use_triton("linear_scan", *inputs, implementation=implementation, unsupported=reason)
    ):
        return chunked_linear_scan(*inputs)
    from nas_kernels.linear_scan.launch import linear_scan_kernels

    check_shape("decay_BTC", decay_BTC, (batch, tokens, channels))
    if state_BC is not None:
        check_shape("state_BC", state_BC, (batch, channels))
    states = linear_scan_kernels(*inputs)
    # A copy: the last state outlives the others.
    return states, states[:, -1].clone()
