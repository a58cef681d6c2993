"""Muon that orthogonalises matrices of one shape together, in place of one after the other.

Shapes: S matrices of N rows and K columns, tall ones turned so that N <= K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
EPS = 1e-7
MAX_NUMBERS = 1 << 26
"""Of matrices that are orthogonalised together, in all: their copies take 10 bytes each."""


class GroupedMuon(torch.optim.Optimizer):
    """The update of `torch.optim.Muon` without weight decay, in fewer and larger launches.

    Momenta have the same name, so that a state fits both. Matrices without a gradient are left
    alone. Equal up to the order of sums in bf16 products.

    Args:
        params: matrices.
        lr: learning rate; that of a tall matrix is raised by the root of its height over its width.
        momentum: of the gradients' running mean, with Nesterov's look ahead.

    Raises:
        ValueError: for a parameter that is no matrix.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (update
    rule, coefficients); PyTorch's `torch.optim.Muon` (rounding to bf16, learning rate by shape).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    raise ValueError(f"Muon is for matrices; one has shape {tuple(param.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure` may compute the loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            used = [param for param in group["params"] if param.grad is not None]
            if used:
                self._move(used, group["lr"], group["momentum"])
        return loss

    def _move(self, params: list[Tensor], lr: float, momentum: float) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        means = [self._momentum(param) for param in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum)
        for places in _same_shape(params):
            updates = orthogonal([ahead[place] for place in places])
            moved = [params[place] for place in places]
            torch._foreach_add_(moved, updates, alpha=-lr * _scale(moved[0].shape))

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        mean: Tensor = state["momentum_buffer"]
        return mean


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices of one shape with singular values brought near 1, in their own dtype.

    Five Newton-Schulz iterations in bf16.

    Source: Jordan et al. 2024, "Muon", section "Newton-Schulz iteration".
    """
    x_SNK = torch.stack(list(matrices)).bfloat16()
    is_tall = x_SNK.shape[1] > x_SNK.shape[2]
    x_SNK = x_SNK.mT if is_tall else x_SNK
    x_SNK = x_SNK / torch.linalg.vector_norm(x_SNK, dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram_SNN = torch.bmm(x_SNK, x_SNK.mT)
        change_SNN = torch.baddbmm(gram_SNN, gram_SNN, gram_SNN, beta=b, alpha=c)
        x_SNK = torch.baddbmm(x_SNK, change_SNN, x_SNK, beta=a)
    x_SNK = x_SNK.mT if is_tall else x_SNK
    # In the order of the parameters' memory, so that all are added in one launch.
    full_SNK = x_SNK.to(matrices[0].dtype, memory_format=torch.contiguous_format)
    return list(full_SNK.unbind())


def _same_shape(params: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of parameters that are updated together."""
    groups: dict[tuple[object, ...], list[list[int]]] = {}
    for place, param in enumerate(params):
        some = groups.setdefault((param.shape, param.dtype, param.device), [[]])
        if some[-1] and (len(some[-1]) + 1) * param.numel() > MAX_NUMBERS:
            some.append([])
        some[-1].append(place)
    return [group for some in groups.values() for group in some]


def _scale(shape: torch.Size) -> float:
    return math.sqrt(max(1.0, shape[0] / shape[1]))
