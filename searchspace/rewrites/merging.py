"""Merging affine maps into the linear maps beside them.

New weights are assigned, never written into: the old ones may be shared.

Shapes: N outputs, K inputs of a linear map.
"""

from __future__ import annotations

from torch import Tensor, nn

from searchspace.linear import Linear

MERGEABLE = ("fp32", "bf16")
"""Precisions whose weights may be rescaled; a quantised weight would get another grid."""


def can_merge(linears: list[Linear]) -> bool:
    """Whether there are maps to merge into, all with plain weights that are not packed yet."""
    return bool(linears) and all(
        linear.precision in MERGEABLE and not linear.packed for linear in linears
    )


def merge_before(linear: Linear, scale_K: Tensor | None, shift_K: Tensor) -> None:
    """Change a linear map f to `x -> f(scale * x + shift)`; a scale of None is 1."""
    linear.add_bias(linear.weight @ shift_K)
    if scale_K is not None:
        linear.weight = replacement(linear.weight, linear.weight * scale_K)


def merge_after(linear: Linear, scale_N: Tensor, shift_N: Tensor) -> None:
    """Change a linear map f to `x -> scale * f(x) + shift`."""
    linear.weight = replacement(linear.weight, linear.weight * scale_N[:, None])
    if linear.bias is not None:
        shift_N = shift_N + (scale_N - 1) * linear.bias
    linear.add_bias(shift_N)


def replacement(old: Tensor, value: Tensor) -> nn.Parameter:
    """Return `value` as a parameter that is trained if `old` is; `old` is left as it is."""
    return nn.Parameter(value.detach(), requires_grad=old.requires_grad)
