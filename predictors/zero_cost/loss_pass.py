"""The one forward and backward pass of the task loss that most metrics are made of.

Shapes: B batch, T tokens, D d_model, V vocabulary or classes, N sampled tokens or outputs of a
linear map, F hidden units, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from predictors.zero_cost._recorder import Recorder
from searchspace.errors import UserError
from searchspace.linear import Linear
from searchspace.sub_blocks import FFNBlock, MixerBlock
from searchspace.subnet import Subnet

MIN_SENSITIVITY = 1e-4
"""Nats per relative change of all weights, below which a loss of about a nat is constant.

Rounding noise of float32 stays some tens of times below it, real networks some thousand times
above.
"""


@dataclass(frozen=True)
class LossPass:
    """What one forward and backward pass of the task loss leaves behind.

    Args:
        loss: mean cross-entropy in nats per scored target.
        weights: every linear map's weight by name.
        gradients: the loss's gradient of each of them.
        patterns: for every FFN which hidden units are positive, bool (N, F).
        jacobian_BTD: gradient of the sum of all logits with respect to the embedded tokens.
        channel_BN: for every linear map the sum over positions of output times its gradient.
        head_BH: for every mixer with heads and an output projection the sum over positions and the
            head's channels of what enters that projection times its gradient.
    """

    loss: float
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    patterns: tuple[Tensor, ...]
    jacobian_BTD: Tensor
    channel_BN: Mapping[str, Tensor]
    head_BH: Mapping[str, Tensor]


def run_loss_pass(network: Subnet, inputs: Tensor, targets: Tensor) -> LossPass:
    """Run a network forward and backward.

    Raises:
        UserError: when the loss is not finite or does not depend on the weights.
    """
    weights, recorder = linear_weights(network), Recorder(network, len(inputs))
    with torch.enable_grad():
        with recorder:
            x_BTD = network.ends.embed(inputs)
            logits = network.ends.logits(network.run_layers(x_BTD), inputs)
            loss = task_loss(logits, targets)
            # Needs the graph for the Jacobian too, but not the weights' gradients a second time.
            grads = torch.autograd.grad(
                loss, list(weights.values()), retain_graph=True, materialize_grads=True
            )
        (jacobian_BTD,) = torch.autograd.grad(logits.sum(), x_BTD)
    gradients = dict(zip(weights, grads, strict=True))
    check_gradients(loss.item(), weights, gradients)
    return LossPass(
        loss=loss.item(),
        weights=weights,
        gradients=gradients,
        patterns=tuple(recorder.patterns),
        jacobian_BTD=jacobian_BTD,
        channel_BN=recorder.channel_BN,
        head_BH=recorder.head_BH,
    )


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the targets that are scored, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def linear_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every linear map by name: what saliencies sum over.

    The embedding is a table look-up (only rows of tokens in the batch would count), and norms and
    biases are no connections.
    """
    return {
        name: module.weight
        for name, module in network.named_modules()
        if isinstance(module, Linear)
    }


def linears_inside(network: Subnet, kind: type[MixerBlock] | type[FFNBlock]) -> set[str]:
    """Return the names of the linear maps inside mixers or inside FFNs."""
    return {
        f"blocks.{name}.{inner}"
        for name, block in network.blocks.items()
        if isinstance(block, kind)
        for inner in linear_weights(block)
    }


def check_gradients(
    loss: float, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> None:
    """Refuse a loss whose gradient is missing: scores would be made of rounding noise.

    `|g| |W|` is how strongly the loss answers to a relative change of all weights. (A sum of
    layer-normalised outputs, used as a loss by published benchmarks of such metrics, is constant:
    its gradient is rounding noise and fails the test.)

    Raises:
        UserError: when the loss or a gradient is not finite, or the gradient vanishes.
    """
    if not math.isfinite(loss):
        raise UserError(f"the loss at random weights is {loss}; the arch cannot be scored")
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise UserError(f"the gradient of {name} at random weights is not finite")
    sensitivity = _norm(gradients) * _norm(weights)
    if sensitivity <= MIN_SENSITIVITY * max(1.0, abs(loss)):
        raise UserError(
            f"the gradient vanishes (|g||W| = {sensitivity:.1e} for a loss of {loss:.3g}), so the "
            "loss is constant; score with a loss that depends on the weights"
        )


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors.values()))
