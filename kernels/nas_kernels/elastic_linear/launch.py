"""How the kernels of the fused linear map are launched; what their backward pass shares.

Shapes: M rows, n outputs, k inputs of a network; N x K of the maximal weight; G networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nas_kernels import tuning
from nas_kernels.dispatch import interpreting, launching_on
from nas_kernels.elastic_linear.blocks import product_tiles
from nas_kernels.launching import Tiles, cdiv, tf32_allowed
from nas_kernels.tiles.types import triton_dtype

if TYPE_CHECKING:
    from nas_kernels.elastic_linear.function import Settings

Weights = Sequence[Tensor | None]


def forward(
    settings: Settings, rows: list[Tensor], weights: Weights, biases: Weights
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return every network's result, and its projections where they are kept.

    Args:
        settings: see there.
        rows: (M, k) of every network, with unit stride along k.
        weights: the maximal weight and the gate's, or None; unit stride along K.
        biases: of both, or None.
    """
    weight, gated = weights[0], weights[1] is not None
    assert weight is not None
    most = max(x.shape[0] for x in rows)
    candidates = product_tiles(most, settings.dtype, gated, rows[0].dtype, weight.dtype)
    blocks = candidates[0]
    with launching_on(weight):
        if tuning.wanted() and most:
            key = (len(rows), most, max(settings.out_features), max(x.shape[1] for x in rows))
            kind = (gated, settings.dtype, weight.dtype)
            run = partial(_forward, settings, rows, weights, biases)
            name = tuning.rounded(*key, *kind)
            blocks = tuning.choose("elastic_linear", name, candidates, run)
        return _forward(settings, rows, weights, biases, blocks)


def _forward(
    settings: Settings, rows: list[Tensor], weights: Weights, biases: Weights, blocks: Tiles
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    from nas_kernels.elastic_linear.triton_kernel import forward_kernel, grouped_forward_kernel

    weight, gated = weights[0], weights[1] is not None
    assert weight is not None
    shapes = [(x.shape[0], n) for x, n in zip(rows, settings.out_features, strict=True)]
    keep = settings.keep and (gated or settings.activation != "none")
    ys, ups, gates = (
        [torch.empty(shape, dtype=settings.dtype, device=weight.device) for shape in shapes]
        if there
        else []
        for there in (True, keep, keep and gated)
    )
    flags = {
        "ACTIVATION": settings.activation,
        "GATED": gated,
        "KEEP": keep,
        "HAS_BIAS": biases[0] is not None,
        "HAS_GATE_BIAS": biases[1] is not None,
        "EVEN": all(x.shape[1] % blocks.block_k == 0 for x in rows),
        **constants(settings.dtype, blocks),
    }
    gate_weight = weights[1] if weights[1] is not None else weight
    vectors = [weight if bias is None else bias for bias in biases]
    tiles = [cdiv(m, blocks.block_m) * cdiv(n, blocks.block_n) for m, n in shapes]
    shared = (weight, gate_weight, *vectors)
    outputs = (ys, ups or ys, gates or ys)
    firsts = [output[0] for output in outputs]
    strides = (weight.stride(0), gate_weight.stride(0))
    if max(tiles) == 0:
        return ys, ups, gates
    if len(rows) == 1:
        x = rows[0]
        sizes = (x.shape[0], shapes[0][1], x.shape[1], x.stride(0))
        forward_kernel[(tiles[0],)](x, *shared, *firsts, *sizes, *strides, **flags)
    else:
        table, align = network_table(rows, *outputs)
        grouped_forward_kernel[(max(tiles), len(rows))](
            table, rows[0], *shared, *firsts, *strides, ALIGN=align, **flags
        )
    return ys, ups, gates


def network_table(
    xs: list[Tensor], ys: list[Tensor], ups: list[Tensor], gates: list[Tensor]
) -> tuple[Tensor, int]:
    """Describe every network in a row of numbers, in the order of `triton_kernel.COLUMNS`.

    Every list becomes distances, in elements, from its first tensor: a kernel that is given a
    pointer to that one knows its dtype, and as much of the others' alignment as is returned. The
    copy to the device keeps a group out of CUDA graphs.
    """
    entries = [
        [
            *(_distance(x, xs[0]), x.stride(0), _distance(y, ys[0])),
            *(_distance(up, ups[0]), _distance(gate, gates[0])),
            *(x.shape[0], y.shape[1], x.shape[1]),
        ]
        for x, y, up, gate in zip(xs, ys, ups, gates, strict=True)
    ]
    # Everything but the number of rows.
    aligned = [number for entry in entries for number in (*entry[:5], *entry[6:])]
    table = torch.tensor(entries, dtype=torch.int64).to(xs[0].device, non_blocking=True)
    return table, math.gcd(16, *aligned)


def _distance(tensor: Tensor, first: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return (tensor.data_ptr() - first.data_ptr()) // tensor.element_size()


def constants(dtype: torch.dtype, blocks: Tiles) -> dict[str, Any]:
    """Return the tile and how it is multiplied; fp32 is cut to TF32 only where PyTorch may."""
    exact = dtype == torch.float32 and not tf32_allowed()
    return {
        "COMPUTE": triton_dtype(dtype),
        "PRECISION": "ieee" if exact or interpreting() else "tf32",
        "BM": blocks.block_m,
        "BN": blocks.block_n,
        "BK": blocks.block_k,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
