"""The linear map every operator is made of, in any precision of `searchspace.precisions`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.dispatch import TRITON, may_have_kernels, use_triton
from nas_kernels.elastic_linear import elastic_linear, why_not
from nas_kernels.int8_linear import QuantizedActivations
from searchspace.errors import unknown
from searchspace.precisions import PRECISIONS
from searchspace.precisions.activations import RoundedActivations
from searchspace.precisions.base import Runtime

MANY = 1 << 21
"""Weights from which on shapes are found without values."""


class Linear(nn.Module):
    """A linear map, without bias unless it is made with one or `add_bias` gave it one.

    Until `pack` it computes in floating point on rounded weights (and activations, where the
    precision rounds those), so it can be trained. Packed, it holds what is really stored and runs
    from that; it then serves inference only.

    Args:
        in_features: K.
        out_features: N.
        precision: a name in `PRECISIONS`.
        bias: add a learned vector to the result; it stays in floating point.

    Raises:
        UserError: when the precision is unknown.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, precision: str = "fp32", bias: bool = False
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.precision = precision
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        # What kernels derive from the stored tensors: never saved, copied or moved.
        self._runtime: Runtime = {}

    @property
    def packed(self) -> bool:
        """Whether the weight is in its stored form."""
        return "weight" in self._buffers

    def reset(self, generator: torch.Generator, gain: float = 1.0) -> None:
        """Draw the weight from a normal of standard deviation `gain / sqrt(K)`; no bias yet."""
        with torch.no_grad():
            std = gain / math.sqrt(self.weight.shape[1])
            self.weight.normal_(0.0, std, generator=generator)
            if self.bias is not None:
                self.bias.zero_()

    def add_bias(self, bias_N: Tensor) -> None:
        """Add to the bias, which is zero at first; it stays in floating point when packed.

        The old bias is left as it is: others may share it.
        """
        if self.bias is not None:
            total_N = self.bias.detach() + bias_N.detach().to(self.bias)
            self.bias = nn.Parameter(total_N, requires_grad=self.bias.requires_grad)
            return
        dtype = torch.float32 if self.packed else self.weight.dtype
        values_N = bias_N.detach().to(self.weight.device, dtype, copy=True)
        self.bias = nn.Parameter(values_N, requires_grad=self.weight.requires_grad)

    def pack(self) -> None:
        """Replace the weight by what is stored; no-op for fp32 and when packed already.

        On the meta device it takes the stored form without values, for loading.
        """
        if self.packed:
            return
        if self.weight.is_meta:
            stored = _packed_empty(self.precision, self.weight.shape, self.weight.dtype)
        else:
            with torch.inference_mode(False), torch.no_grad():
                stored = PRECISIONS[self.precision].pack(self.weight)
        if stored:
            del self.weight
            for name, tensor in stored.items():
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor | QuantizedActivations | RoundedActivations) -> Tensor:
        """Map `x` (..., K) to (..., N); `project` hands in inputs that are rounded already."""
        precision = PRECISIONS[self.precision]
        if self.packed:
            stored = cast(Mapping[str, Tensor], self._buffers)
            out = precision.run(precision.activations.quantize(x), stored, self._runtime)
            return out if self.bias is None else out + self.bias.to(out.dtype)
        weight_NK = precision.fake_weight(self.weight)
        return F.linear(precision.activations.values(x), weight_NK, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self._runtime = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._runtime = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runtime": {}}


def project(x: Tensor, *linears: Linear) -> list[Tensor]:
    """Apply several maps to the same input, rounding it once for all that round it alike."""
    shared: dict[tuple[int, bool], Any] = {}
    outputs = []
    for linear in linears:
        activations, packed = PRECISIONS[linear.precision].activations, linear.packed
        key = (id(activations), packed)
        if key not in shared:
            shared[key] = activations.quantize(x) if packed else activations.round(x)
        outputs.append(linear(shared[key]))
    return outputs


def fusable(x: Tensor, *linears: Linear) -> bool:
    """Whether `fused_linear` has a kernel for maps that are applied in floating point as they are.

    Maps that are watched by hooks, or packed, are called one by one.
    """
    if not may_have_kernels(x):
        return False
    plain = all(
        type(linear) is Linear
        and not linear.packed
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        for linear in linears
    )
    if not plain:
        return False
    weights = [linear.weight for linear in linears]
    reason = why_not(x, weights[0])
    return use_triton("elastic_linear", x, *weights, prefer_reference=reason)


def fused_linear(x: Tensor, activation: str, linear: Linear, gate: Linear | None = None) -> Tensor:
    """Return the activated map of `x`, or the map times the activated gate, in one launch.

    Args:
        x: (..., K).
        activation: see `nas_kernels.elastic_linear.elastic_linear`.
        linear: the map.
        gate: of the same size and precision.
    """
    precision = PRECISIONS[linear.precision]
    return elastic_linear(
        precision.activations.values(precision.activations.round(x)),
        precision.fake_weight(linear.weight),
        linear.bias,
        activation=activation,
        gate_weight_NK=None if gate is None else precision.fake_weight(gate.weight),
        gate_bias_N=None if gate is None else gate.bias,
        implementation=TRITON,
    )


def _packed_empty(precision: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.empty(stored_shape, dtype=stored_dtype, device="meta")
        for name, stored_shape, stored_dtype in _packed_shapes(precision, shape, dtype)
    }


@functools.lru_cache(maxsize=4096)
def _packed_shapes(
    precision: str, shape: torch.Size, dtype: torch.dtype
) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Read off a zero weight what is stored for this shape; once, costs ask often."""
    # Small ones with values: PyTorch's first reduction on meta imports 800 modules, for 2.4 s.
    device = "cpu" if shape.numel() < MANY else "meta"
    with torch.no_grad():
        stored = PRECISIONS[precision].pack(torch.zeros(shape, dtype=dtype, device=device))
    return [(name, tensor.shape, tensor.dtype) for name, tensor in stored.items()]
