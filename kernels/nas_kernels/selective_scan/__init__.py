"""The selective state space recurrence of Mamba (S6).

`selective_scan` and `step` run as Triton kernels on a GPU, else in PyTorch.

Shapes: B batch, T tokens, C channels, S numbers of state per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.dispatch import AUTO, use_triton, wants_gradient
from nas_kernels.launching import check_shape, check_written
from nas_kernels.precision import at_least_fp32
from nas_kernels.recurrence import recorded
from nas_kernels.selective_scan.chunked import selective_scan as chunked_selective_scan
from nas_kernels.selective_scan.ref import recurrent_selective_scan

__all__ = ["recurrent_selective_scan", "selective_scan", "step"]


def selective_scan(
    x_BTC: Tensor,
    delta_BTC: Tensor,
    a_CS: Tensor,
    write_BTS: Tensor,
    read_BTS: Tensor,
    state_BCS: Tensor | None = None,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_selective_scan` in chunks; same arguments, results in fp32 or wider.

    Args:
        x_BTC: inputs.
        delta_BTC: step sizes, > 0.
        a_CS: diagonal state matrix, < 0.
        write_BTS: B, how an input enters the state.
        read_BTS: C, how the state is read.
        state_BCS: h before the first token; None means zeros.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes that go to a kernel do not fit.

    Source: Gu and Dao 2023, "Mamba", section 3.3.2 (scan, recomputation).
    """
    inputs = (x_BTC, delta_BTC, a_CS, write_BTS, read_BTS, state_BCS)
    if x_BTC.shape[1] == 0:
        return _no_tokens(x_BTC, a_CS, state_BCS)
    empty = x_BTC.numel() == 0 or a_CS.numel() == 0
    reason = "it is recorded as a graph" if recorded() else None
    if empty or not use_triton(
        "selective_scan", *inputs, implementation=implementation, unsupported=reason
    ):
        return chunked_selective_scan(*inputs)
    from nas_kernels.selective_scan.launch import selective_scan_kernels, step_kernel

    _check_shapes(*inputs)
    if x_BTC.shape[1] > 1 or wants_gradient(*inputs):
        return selective_scan_kernels(*inputs)
    last = torch.empty(x_BTC.shape[0], *a_CS.shape, device=x_BTC.device, dtype=torch.float32)
    x, delta, write, read = (z[:, 0] for z in (x_BTC, delta_BTC, write_BTS, read_BTS))
    return step_kernel(x, delta, a_CS, write, read, state_BCS, last)[:, None], last


def step(
    x_BC: Tensor,
    delta_BC: Tensor,
    a_CS: Tensor,
    write_BS: Tensor,
    read_BS: Tensor,
    state_BCS: Tensor,
    *,
    implementation: str = AUTO,
) -> Tensor:
    """Process one token: update `state_BCS` in place and return y (B, C).

    On a GPU this is one launch for all channels and sequences. It has no gradient.

    Args:
        x_BC: inputs.
        delta_BC: step sizes, > 0.
        a_CS: diagonal state matrix, < 0.
        write_BS: B, how an input enters the state.
        read_BS: C, how the state is read.
        state_BCS: is changed.
        implementation: see `nas_kernels.dispatch.use_triton`.

    Raises:
        ValueError: when shapes do not fit, or numbers of the state share memory.

    Source: Gu and Dao 2023, "Mamba", equation 2.
    """
    inputs = (x_BC, delta_BC, a_CS, write_BS, read_BS, state_BCS)
    _check_shapes(*inputs)
    check_written("state_BCS", state_BCS)
    with torch.no_grad():
        if state_BCS.numel() and use_triton(
            "selective_scan.step", *inputs, implementation=implementation
        ):
            from nas_kernels.selective_scan.launch import step_kernel

            return step_kernel(x_BC, delta_BC, a_CS, write_BS, read_BS, state_BCS, state_BCS)
        x, delta, write, read = (z[:, None] for z in (x_BC, delta_BC, write_BS, read_BS))
        out, after = chunked_selective_scan(x, delta, a_CS, write, read, state_BCS)
        state_BCS.copy_(after)
        return out[:, 0]


def _check_shapes(
    x: Tensor, delta: Tensor, a: Tensor, write: Tensor, read: Tensor, state: Tensor | None
) -> None:
    channels, num_states = a.shape
    check_shape("x", x, (*x.shape[:-1], channels))
    check_shape("delta", delta, tuple(x.shape))
    check_shape("write", write, (*x.shape[:-1], num_states))
    check_shape("read", read, (*x.shape[:-1], num_states))
    if state is not None:
        check_shape("state", state, (x.shape[0], channels, num_states))


def _no_tokens(x: Tensor, a: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    x = at_least_fp32(x)
    state = x.new_zeros(x.shape[0], *a.shape) if state is None else state
    return x, state.to(x.dtype)
