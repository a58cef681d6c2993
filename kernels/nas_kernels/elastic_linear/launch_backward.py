"""How the gradients of the fused linear map are launched.

Shapes: M rows, n outputs, k inputs of a network; N x K of the maximal weight; S parts of the rows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nas_kernels import tuning
from nas_kernels.dispatch import launching_on, num_multiprocessors
from nas_kernels.elastic_linear.blocks import num_parts, product_tiles, weight_tiles
from nas_kernels.elastic_linear.launch import Weights, constants, network_table
from nas_kernels.launching import Tiles, cdiv

ELEMENTWISE_BLOCK = 1024


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
            activation_gradient_kernel[(cdiv(count, ELEMENTWISE_BLOCK),)](
                dy, up, up if gate is None else gate, dup, dup if dgate is None else dgate, count,
                ACTIVATION=activation, GATED=gate is not None, BLOCK=ELEMENTWISE_BLOCK,
            )  # fmt: skip
    return dup, dgate


def input_gradient(
    xs: list[Tensor], dups: list[Tensor], dgates: list[Tensor], weights: Weights
) -> list[Tensor]:
    """Return `dup W + dgate W_gate` of every network, (M, k) in the dtype of its input."""
    weight, dtype = weights[0], dups[0].dtype
    assert weight is not None
    most = max(x.shape[0] for x in xs)
    candidates = product_tiles(most, dtype, False, dtype, weight.dtype)
    blocks = candidates[0]
    with launching_on(weight):
        if tuning.wanted() and most:
            widest = max(dup.shape[1] for dup in dups), max(x.shape[1] for x in xs)
            key = tuning.rounded(len(xs), most, *widest, bool(dgates), dtype, weight.dtype)
            run = partial(_input_gradient, xs, dups, dgates, weights)
            blocks = tuning.choose("elastic_linear input gradient", key, candidates, run)
        return _input_gradient(xs, dups, dgates, weights, blocks)


def _input_gradient(
    xs: list[Tensor], dups: list[Tensor], dgates: list[Tensor], weights: Weights, blocks: Tiles
) -> list[Tensor]:
    from nas_kernels.elastic_linear.triton_kernel_backward import (
        grouped_input_gradient_kernel,
        input_gradient_kernel,
    )

    weight = weights[0]
    assert weight is not None
    gate_weight = weights[1] if weights[1] is not None else weight
    dxs = [torch.empty(x.shape, dtype=xs[0].dtype, device=x.device) for x in xs]
    tiles = [cdiv(x.shape[0], blocks.block_m) * cdiv(x.shape[1], blocks.block_n) for x in xs]
    flags = {"GATED": bool(dgates), **constants(dups[0].dtype, blocks)}
    strides = (weight.stride(0), gate_weight.stride(0))
    if max(tiles) == 0:
        return dxs
    firsts = (dups[0], dgates[0] if dgates else dups[0], weight, gate_weight, dxs[0])
    if len(xs) == 1:
        sizes = (*dups[0].shape, dxs[0].shape[1])
        input_gradient_kernel[(tiles[0],)](*firsts, *sizes, *strides, **flags)
    else:
        table, align = network_table(dxs, dups, dups, dgates or dups)
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
    weight, dtype = weights[0], dups[0].dtype
    assert weight is not None
    candidates = weight_tiles(dtype, bool(dgates), xs[0].dtype)
    blocks, most = candidates[0], max(x.shape[0] for x in xs)
    with launching_on(weight):
        if tuning.wanted() and most:
            key = tuning.rounded(len(xs), most, *weight.shape, bool(dgates), dtype, xs[0].dtype)
            run = partial(_weight_gradient, xs, dups, dgates, weights)
            blocks = tuning.choose("elastic_linear weight gradient", key, candidates, run)
        return _weight_gradient(xs, dups, dgates, weights, blocks)


def _weight_gradient(
    xs: list[Tensor], dups: list[Tensor], dgates: list[Tensor], weights: Weights, blocks: Tiles
) -> tuple[Tensor | None, Tensor | None]:
    from nas_kernels.elastic_linear.triton_kernel_backward import weight_gradient_kernel

    weight, gate_weight = weights
    assert weight is not None
    (num_out, num_in), most = weight.shape, max(x.shape[0] for x in xs)
    tiles = cdiv(num_out, blocks.block_n) * cdiv(num_in, blocks.block_k)
    splits = num_parts(tiles, most, blocks, num_multiprocessors(weight.device))
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
        table, align = network_table(xs, dups, dups, dgates or dups) if groups else (dups[0], 1)
        weight_gradient_kernel[(tiles, splits)](
            table, dups[0], dgates[0] if dgates else dups[0], xs[0], dweights[0],
            dweights[0] if dweights[1] is None else dweights[1],
            *dups[0].shape, xs[0].shape[1], xs[0].stride(0), num_out, num_in, GROUPS=groups,
            SPLITS=splits, ALIGN=align, GATED=bool(dgates),
            **constants(dups[0].dtype, blocks),
        )  # fmt: skip
    return _added(dweights[0], weight), _added(dweights[1], gate_weight)


def _added(parts_SNK: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if parts_SNK is None or weight is None:
        return None
    return parts_SNK[0] if parts_SNK.shape[0] == 1 else parts_SNK.sum(dim=0).to(weight.dtype)
