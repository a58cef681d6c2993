"""The flow of ones through positive weights, which `synflow` and `dss` are made of.

Shapes: T tokens, D d_model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.zero_cost.loss_pass import linear_weights
from searchspace.mixers.base import SharedKV
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet


@dataclass(frozen=True)
class FlowPass:
    """What one pass of ones through positive weights leaves behind, in float64.

    Args:
        weights: the absolute weight of every linear map by name.
        gradients: the gradient of the sum of the outputs by each of them, times
            ``exp(-log_scale)``.
        log_scale: logarithm of what the outputs were divided by on the way.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    log_scale: float


def run_flow_pass(network: Subnet, tokens: int) -> FlowPass:
    """Run one sequence of ones through the absolute weights, forward and backward.

    The flow of a chain of linear maps is what the metrics were made for. To keep to it:

    - Norms become the identity (with them the sum R of the outputs would hardly depend on any
      weight; without a head behind the last one, not at all).
    - An operator f that is not linear is made homogeneous of degree one, ``s f(x / s)`` with the
      token's root mean square s held constant in the backward pass. A linear map is untouched by
      that; squared ReLU, gates, attention scores and decays act as they do on inputs of unit
      size, instead of the flow becoming a matter of the operators' degrees (log R would double
      with every squared ReLU).
    - All tokens are equal then, so softmax and normalised linear attention hand on the value
      whatever their queries and keys: these get no flow, values and outputs get all of it. In
      gated linear attention the output gate carries flow as well, and the query, key and decay
      that part of it that the norm of each head lets through.
    - Everything is computed in float64, for one sequence, from the embedding's output on; low
      precisions round as in training and pass gradients straight through. Of a class token's
      network only that token's output counts.
    - After every operator the stream is divided by its largest value, which is put back in the
      logarithm; so neither depth nor an operator of high degree overflows.

    Args:
        network: changed: it must be a float64 copy.
        tokens: T, a class token counted.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    weights = linear_weights(network)
    with torch.enable_grad():
        output, log_scale = _homogeneous_output(network, tokens)
        # What projects patches or embeddings lies before the input of ones: no flow.
        gradients = torch.autograd.grad(
            output.sum(), list(weights.values()), materialize_grads=True
        )
    return FlowPass(
        weights={name: weight.detach() for name, weight in weights.items()},
        gradients=dict(zip(weights, gradients, strict=True)),
        log_scale=log_scale,
    )


def _homogeneous_output(network: Subnet, tokens: int) -> tuple[Tensor, float]:
    """Return the head's outputs, and the logarithm of what they were divided by."""
    head = network.ends.head
    x_1TD = torch.ones(1, tokens, head.weight.shape[1], dtype=head.weight.dtype)
    shared, log_scale = SharedKV(), 0.0
    for block in network.blocks.values():
        assert isinstance(block, MixerBlock | FFNBlock)
        size_1T1 = x_1TD.detach().square().mean(dim=-1, keepdim=True).sqrt()
        shares_kv = isinstance(block, MixerBlock) and block.op.shares_kv
        arguments = (None, shared) if shares_kv else ()
        x_1TD = x_1TD + size_1T1 * block.op(x_1TD / size_1T1, *arguments)
        scale = float(x_1TD.detach().abs().max())
        x_1TD, log_scale = x_1TD / scale, log_scale + math.log(scale)
    if network.ends.family.num_extra_tokens:
        x_1TD = x_1TD[:, :1]
    output: Tensor = head(x_1TD)
    return output, log_scale
