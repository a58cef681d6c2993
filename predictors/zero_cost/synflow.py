"""Synaptic flow: how much signal positive weights carry from end to end.

Shapes: T tokens, D d_model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from predictors.zero_cost.probe import Probe, linear_weights
from searchspace.errors import UserError
from searchspace.mixers.base import SharedKV
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet


def synflow(probe: Probe) -> float:
    """Return ``log sum |W * dR/dW|``: R the sum of the outputs for an input of ones, W := |W|.

    The flow of a chain of linear maps is what the metric was made for. To keep to it:

    - Norms become the identity (with them R would hardly depend on any weight).
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

    Source: Tanaka et al. 2020, "Pruning neural networks without any data", equation 1 and
    algorithm 1; sum over the network and logarithm as in Abdelfattah et al. 2021.
    """
    network = probe.copy_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    weights = list(linear_weights(network).values())
    with torch.enable_grad():
        output, log_scale = _homogeneous_output(network, tokens=probe.num_tokens)
        # A patch projection lies before the input of ones and carries no flow.
        gradients = torch.autograd.grad(output.sum(), weights, materialize_grads=True)
    saliency = sum(
        float((w.detach() * g).abs().sum()) for w, g in zip(weights, gradients, strict=True)
    )
    if not math.isfinite(saliency) or saliency <= 0:
        mixers = ", ".join(dict.fromkeys(layer.mixer for layer in probe.arch.layers))
        raise UserError(
            f"the flow through positive weights is {saliency}, which has no logarithm (mixers: "
            f"{mixers}); leave synflow out of search.metrics"
        )
    return math.log(saliency) + log_scale


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
