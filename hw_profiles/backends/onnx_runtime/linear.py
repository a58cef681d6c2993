"""Weight-only quantised linear maps in the form ONNX Runtime has for them, `MatMulNBits`.

The other precisions need nothing of the kind: what PyTorch runs for them is translated.

Shapes: N output rows, K columns, G groups of 32 columns, P stored bytes of a group.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.int4_linear import GROUP
from nas_kernels.int4_linear.ref import MIDDLE, pack_nibbles, unpack_nibbles
from searchspace.linear import Linear

FEW_ROWS = 32
"""Rows up to which rounding activations to int8 pays; see `accuracy_level`."""
INT8_MIDDLE = 128


@torch.library.custom_op("hwnas::matmul_nbits", mutates_args=())
def matmul_nbits(x: Tensor, packed_NGP: Tensor, scale_NG: Tensor, bits: int, level: int) -> Tensor:
    """Return `x @ weight.T` (..., N) of unsigned codes with their middle as zero.

    Args:
        x: (..., K).
        packed_NGP: uint8 codes, two to a byte at 4 bits.
        scale_NG: fp32 scales of the groups.
        bits: 4 or 8.
        level: `accuracy_level` of ONNX Runtime's operator; it has no meaning here.
    """
    columns = scale_NG.shape[1] * GROUP
    flat = packed_NGP.flatten(1)
    codes = unpack_nibbles(flat, columns) if bits == 4 else flat
    values = codes.to(x.dtype) - (1 << (bits - 1))
    weight = values.unflatten(1, (-1, GROUP)) * scale_NG[..., None].to(x.dtype)
    return F.linear(x, weight.flatten(1)[:, : x.shape[-1]])


@matmul_nbits.register_fake
def _(x: Tensor, packed_NGP: Tensor, scale_NG: Tensor, bits: int, level: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed_NGP.shape[0])


def accuracy_level(bits: int, rows: int) -> int:
    """Return in what ONNX Runtime computes: 4 is int8 (activations rounded in groups), 1 is fp32.

    Measured on AVX-512: int8 is 2.5 times as fast at 1 row; at 256 rows 1.4 times slower with
    4-bit weights, and 1.2 times faster with 8-bit ones.
    """
    return 4 if bits == 8 or rows <= FEW_ROWS else 1


class NBitsLinear(nn.Module):
    """A packed `Linear` of int8 or int4 weights and unrounded activations."""

    def __init__(self, linear: Linear, rows: int) -> None:
        super().__init__()
        self.precision, self.packed, self.bias = linear.precision, True, linear.bias
        self.bits = 4 if linear.precision == "int4" else 8
        self.level = accuracy_level(self.bits, rows)
        stored = cast(dict[str, Tensor], linear._buffers)
        self.zero_GN: Tensor | None = None
        if linear.precision == "int4":
            self.packed_NGP, self.scale_NG, self.zero_GN = _int4(stored)
        else:
            self.packed_NGP, self.scale_NG = _int8(stored)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., K) to (..., N)."""
        out = matmul_nbits(x, self.packed_NGP, self.scale_NG, self.bits, self.level)
        if self.zero_GN is not None:
            # The operator's own fractional zero points make it dequantise at every call.
            padded = F.pad(x, (0, -x.shape[-1] % GROUP))
            out = out + padded.unflatten(-1, (-1, GROUP)).sum(dim=-1) @ self.zero_GN
        return out if self.bias is None else out + self.bias


def _int4(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    scale_NG = stored["weight_scale"].float()
    columns = 2 * stored["weight"].shape[1]
    codes_NK = F.pad(
        unpack_nibbles(stored["weight"], columns),
        (0, scale_NG.shape[1] * GROUP - columns),
        value=MIDDLE,
    )
    packed_NGP = pack_nibbles(codes_NK).unflatten(1, (-1, GROUP // 2))
    return packed_NGP, scale_NG, stored["weight_zero"].float().t().contiguous()


def _int8(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    values_NK = stored["weight"]
    codes_NK = (values_NK.to(torch.int16) + INT8_MIDDLE).to(torch.uint8)
    codes_NK = F.pad(codes_NK, (0, -values_NK.shape[1] % GROUP), value=INT8_MIDDLE)
    packed_NGP = codes_NK.unflatten(1, (-1, GROUP))
    scale_NG = stored["weight_scale"].float()[:, None].expand(-1, packed_NGP.shape[1])
    return packed_NGP, scale_NG.contiguous()


def with_exportable_linears(module: nn.Module, rows: int) -> Any:
    """Return a copy of a module, on the same tensors, with its weight-only maps replaced.

    Args:
        module: packed.
        rows: tokens of one call.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # Told that these are copied already, `deepcopy` copies the structure only.
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            weight_only = getattr(child, "precision", "") in ("int4", "int8_weight")
            if isinstance(child, Linear) and child.packed and weight_only:
                setattr(parent, name, NBitsLinear(child, rows))
    return copied
