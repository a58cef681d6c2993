"""How the kernels of the fused linear map are launched.

Shapes: M rows, n outputs, k inputs of a network; N x K of the maximal weight; G networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nas_kernels.dispatch import interpreting, launching_on, num_multiprocessors
from nas_kernels.launching import power_of_two_below, tf32_allowed
from nas_kernels.tiles.types import triton_dtype

if TYPE_CHECKING:
    from nas_kernels.elastic_linear.function import Settings

Weights = Sequence[Tensor | None]
ELEMENTWISE_BLOCK = 1024


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
    blocks = _blocks(max(m for m, _ in shapes), settings.dtype, gated, weight.dtype)
    flags = {
        "ACTIVATION": settings.activation,
        "GATED": gated,
        "KEEP": keep,
        "HAS_BIAS": biases[0] is not None,
        "HAS_GATE_BIAS": biases[1] is not None,
        "EVEN": all(x.shape[1] % blocks["BK"] == 0 for x in rows),
        **_products(settings.dtype),
        **blocks,
    }
    gate_weight = weights[1] if weights[1] is not None else weight
    vectors = [weight if bias is None else bias for bias in biases]
    tiles = [_num_tiles(m, n, blocks["BM"], blocks["BN"]) for m, n in shapes]
    shared = (weight, gate_weight, *vectors)
    outputs = (ys, ups or ys, gates or ys)
    strides = (weight.stride(0), gate_weight.stride(0))
    if max(tiles) == 0:
        return ys, ups, gates
    with launching_on(weight):
        if len(rows) == 1:
            x, firsts = rows[0], [output[0] for output in outputs]
            sizes = (x.shape[0], shapes[0][1], x.shape[1], x.stride(0))
            forward_kernel[(tiles[0],)](x, *shared, *firsts, *sizes, *strides, **flags)
        else:
            table, align = _table(rows, *outputs)
            firsts = [output[0] for output in outputs]
            grouped_forward_kernel[(max(tiles), len(rows))](
                table, rows[0], *shared, *firsts, *strides, ALIGN=align, **flags
            )
    return ys, ups, gates


def activation_gradient(
    activation: str, dy: Tensor, up: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the projection and of the gate; without either, `dy` itself."""
    if up is None:
        return dy, None
    from nas_kernels.elastic_linear.triton_kernel_backward import activation_gradient_kernel

    dup, dgate = torch.empty_like(dy), None if gate is None else torch.empty_like(dy)
    count = dy.numel()
    if count:
        with launching_on(dy):
            activation_gradient_kernel[(-(-count // ELEMENTWISE_BLOCK),)](
                dy, up, up if gate is None else gate, dup, dup if dgate is None else dgate, count,
                ACTIVATION=activation, GATED=gate is not None, BLOCK=ELEMENTWISE_BLOCK,
            )  # fmt: skip
    return dup, dgate


def input_gradient(
    xs: list[Tensor], dups: list[Tensor], dgates: list[Tensor], weights: Weights
) -> list[Tensor]:
    """Return `dup W + dgate W_gate` of every network, (M, k) in the dtype of its input."""
    from nas_kernels.elastic_linear.triton_kernel_backward import (
        grouped_input_gradient_kernel,
        input_gradient_kernel,
    )

    weight, dtype = weights[0], dups[0].dtype
    assert weight is not None
    gate_weight = weights[1] if weights[1] is not None else weight
    dxs = [torch.empty(x.shape, dtype=xs[0].dtype, device=x.device) for x in xs]
    blocks = _blocks(max(x.shape[0] for x in xs), dtype, False, weight.dtype)
    tiles = [_num_tiles(x.shape[0], x.shape[1], blocks["BM"], blocks["BN"]) for x in xs]
    flags = {"GATED": bool(dgates), **_products(dtype), **blocks}
    strides = (weight.stride(0), gate_weight.stride(0))
    if max(tiles) == 0:
        return dxs
    firsts = (dups[0], dgates[0] if dgates else dups[0], weight, gate_weight, dxs[0])
    with launching_on(weight):
        if len(xs) == 1:
            sizes = (*dups[0].shape, dxs[0].shape[1])
            input_gradient_kernel[(tiles[0],)](*firsts, *sizes, *strides, **flags)
        else:
            table, align = _table(dxs, dups, dups, dgates or dups)
            grouped_input_gradient_kernel[(max(tiles), len(xs))](
                table, *firsts, *strides, ALIGN=align, **flags
            )
    return dxs


def weight_gradient(
    xs: list[Tensor], dups: list[Tensor], dgates: list[Tensor], weights: Weights
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of both weights, of their whole size and dtype.

    Where the weight has fewer tiles than the device has room for, rows are split among programs;
    their results are added in a second step, always in the same order.
    """
    from nas_kernels.elastic_linear.triton_kernel_backward import weight_gradient_kernel

    weight, gate_weight = weights
    assert weight is not None
    (num_out, num_in), dtype = weight.shape, dups[0].dtype
    blocks = _weight_blocks(dtype, bool(dgates), xs[0].dtype)
    tiles = _num_tiles(num_out, num_in, blocks["BN"], blocks["BK"])
    splits = _splits(tiles, max(x.shape[0] for x in xs), blocks["BM"], weight.device)
    dweights = [
        None
        if w is None
        else torch.empty(
            (splits, num_out, num_in),
            dtype=w.dtype if splits == 1 else torch.float32,
            device=w.device,
        )
        for w in (weight, gate_weight)
    ]
    if tiles:
        groups = len(xs) if len(xs) > 1 else 0
        table, align = _table(xs, dups, dups, dgates or dups) if groups else (dups[0], 1)
        with launching_on(weight):
            weight_gradient_kernel[(tiles, splits)](
                table, dups[0], dgates[0] if dgates else dups[0], xs[0], dweights[0],
                dweights[0] if dweights[1] is None else dweights[1],
                *dups[0].shape, xs[0].shape[1], xs[0].stride(0), num_out, num_in, GROUPS=groups,
                SPLITS=splits, ALIGN=align, GATED=bool(dgates), **_products(dtype), **blocks,
            )  # fmt: skip
    return _added(dweights[0], weight), _added(dweights[1], gate_weight)


def _added(parts_SNK: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if parts_SNK is None or weight is None:
        return None
    return parts_SNK[0] if parts_SNK.shape[0] == 1 else parts_SNK.sum(dim=0).to(weight.dtype)


def _table(
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


def _splits(tiles: int, rows: int, block_rows: int, device: torch.device) -> int:
    """Return parts of the rows: two programs a multiprocessor, each with several blocks."""
    room = 2 * num_multiprocessors(device) // max(tiles, 1)
    return power_of_two_below(min(room, rows // (4 * block_rows), 8))


def _num_tiles(rows: int, columns: int, block_rows: int, block_columns: int) -> int:
    return -(-rows // block_rows) * -(-columns // block_columns)


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """Return in what operands are multiplied; fp32 is cut to TF32 only where PyTorch may do so."""
    exact = dtype == torch.float32 and not tf32_allowed()
    return {
        "COMPUTE": triton_dtype(dtype),
        "PRECISION": "ieee" if exact or interpreting() else "tf32",
    }


def _blocks(rows: int, dtype: torch.dtype, gated: bool, weight: torch.dtype) -> dict[str, int]:
    """Return the tile of a product of `rows` rows, and how it is computed."""
    if interpreting():
        return {"BM": 32, "BN": 32, "BK": 32}
    if rows <= 64:
        # Few rows: the weight's traffic counts, so many programs, each with long rows of it.
        few = max(16, 1 << max(rows - 1, 0).bit_length())
        stages = 4 if few == 16 and weight.itemsize == 2 else 3
        return {"BM": few, "BN": 32, "BK": 128, "num_warps": 4, "num_stages": stages}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
    # Operands that are wider than they are multiplied in take twice the shared memory.
    stages = 3 if weight == dtype else 2
    columns = 64 if gated else 128
    return {"BM": 128, "BN": columns, "BK": 64, "num_warps": 8, "num_stages": stages}


def _weight_blocks(dtype: torch.dtype, gated: bool, x: torch.dtype) -> dict[str, int]:
    """Return the tile of the weights' gradients, BN x BK, and rows at a time, BM."""
    if interpreting():
        return {"BM": 32, "BN": 32, "BK": 32}
    if dtype == torch.float32:
        return {"BM": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    stages = 3 if x == dtype else 2
    return {"BM": 64, "BN": 64 if gated else 128, "BK": 128, "num_warps": 8, "num_stages": stages}
