"""The fused linear map as a differentiable function of several networks' inputs.

Backward uses the projections before the activation, which forward stores: computing them again
would cost a third more products, and PyTorch's own composition stores twice as much.

Shapes: M rows, n outputs, k inputs of a network; N x K of the maximal weight; G networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas_kernels.elastic_linear import launch, launch_backward
from nas_kernels.strides import as_rows, unit_rows


@dataclass(frozen=True)
class Settings:
    """What is no tensor.

    Attributes:
        out_features: n of every network.
        activation: of the gate where there is one, else of the projection.
        dtype: in which operands are multiplied, and of results.
        keep: whether there will be a backward pass.
    """

    out_features: tuple[int, ...]
    activation: str
    dtype: torch.dtype
    keep: bool


class ElasticLinear(torch.autograd.Function):
    """One result (..., n) for every network's input (..., k)."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        weight_NK: Tensor,
        gate_weight_NK: Tensor | None,
        bias_N: Tensor | None,
        gate_bias_N: Tensor | None,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute the results; the weights' rows may lie in still wider ones."""
        rows = [as_rows(x) for x in xs]
        weights = [unit_rows(w) if w is not None else None for w in (weight_NK, gate_weight_NK)]
        biases = [None if b is None else b.contiguous() for b in (bias_N, gate_bias_N)]
        ys, ups, gates = launch.forward(settings, rows, weights, biases)
        ctx.settings, ctx.num = settings, len(xs)
        ctx.shapes = [x.shape for x in xs]
        ctx.bias_like = [None if b is None else (b.shape, b.dtype) for b in (bias_N, gate_bias_N)]
        ctx.set_materialize_grads(False)
        if settings.keep:
            ctx.save_for_backward(*weights, *rows, *ups, *gates)
        pairs = zip(ys, xs, strict=True)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y, x in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        """Return the gradients of weights, biases and inputs that need one."""
        num, settings = ctx.num, ctx.settings
        weights, saved = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        rows, ups, gates = saved[:num], saved[num : 2 * num], saved[2 * num :]
        wanted = ctx.needs_input_grad
        # A network whose result nothing uses has no part in any gradient.
        given = {i: dy for i, dy in enumerate(dys) if dy is not None}
        used = list(given)
        if not given:
            return (None,) * (5 + num)
        dups, dgates = [], []
        for i, dy in given.items():
            dy_Mn = as_rows(dy).to(settings.dtype).contiguous()
            gate = gates[i] if gates else None
            dup, dgate = launch_backward.activation_gradient(
                settings.activation, dy_Mn, ups[i] if ups else None, gate
            )
            dups.append(dup)
            dgates += [] if dgate is None else [dgate]
        xs = [rows[i] for i in used]
        dweights: tuple[Tensor | None, ...] = (None, None)
        if wanted[1] or wanted[2]:
            dweights = launch_backward.weight_gradient(xs, dups, dgates, weights)
        dxs: list[Tensor | None] = [None] * num
        if any(wanted[5:]):
            found = launch_backward.input_gradient(xs, dups, dgates, weights)
            for i, dx in zip(used, found, strict=True):
                dxs[i] = dx.view(ctx.shapes[i])
        dbiases = [
            _bias_gradient(grads, like) if needed else None
            for grads, like, needed in zip((dups, dgates), ctx.bias_like, wanted[3:5], strict=True)
        ]
        return None, *dweights, *dbiases, *dxs


def _bias_gradient(grads: list[Tensor], like: tuple[torch.Size, torch.dtype]) -> Tensor:
    shape, dtype = like
    total_N = torch.zeros(shape, dtype=torch.float32, device=grads[0].device)
    for grad_Mn in grads:
        total_N[: grad_Mn.shape[1]] += grad_Mn.sum(dim=0, dtype=torch.float32)
    return total_N.to(dtype)
