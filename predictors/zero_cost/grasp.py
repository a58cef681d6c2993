"""What a step down the gradient would do to the gradient, connection by connection."""

from __future__ import annotations

import torch
from torch import Tensor

from predictors.zero_cost._twice import twice_differentiable
from predictors.zero_cost.loss_pass import check_gradients, linear_weights, task_loss
from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError
from searchspace.subnet import Subnet


def grasp(probe: Probe) -> float:
    """Return ``-sum W * (H g)`` over all linear maps: g the task loss's gradient, H its Hessian.

    It is the change of ``|g|^2 / 2`` for a relative decrease of all weights. Higher counts as
    better, the sign of Abdelfattah et al.; as a pruning score the paper removes the weights with
    the highest values. ``H g`` is the gradient of ``<stop(g), g>``, with g and H restricted to the
    linear maps; rounding in low precisions is passed straight through both times.

    Source: Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
    the score S(-theta) of section 4; summed up as in Abdelfattah et al. 2021, "Zero-Cost Proxies
    for Lightweight NAS", section 3.2.

    Raises:
        UserError: when the gradient vanishes, or has no finite gradient itself.
    """
    done = hessian_products(probe.network, probe.inputs, probe.targets)
    total = 0.0
    for name, (weight, product) in done.items():
        if not bool(torch.isfinite(product).all()):
            raise UserError(f"the second derivative of the loss by {name} is not finite")
        total -= float((weight * product).sum(dtype=torch.float64))
    return total


def hessian_products(
    network: Subnet, inputs: Tensor, targets: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return W and H g of every linear map by name.

    Raises:
        UserError: when the gradient vanishes or an operation's gradient has none itself.
    """
    weights = linear_weights(network)
    try:
        with torch.enable_grad(), twice_differentiable():
            loss = task_loss(network(inputs), targets)
            grads = torch.autograd.grad(
                loss, list(weights.values()), create_graph=True, materialize_grads=True
            )
            check_gradients(loss.item(), weights, dict(zip(weights, grads, strict=True)))
            square = sum(((g.detach() * g).sum() for g in grads), start=loss.new_zeros(()))
            square.backward()
        return {
            name: (
                weight.detach(),
                torch.zeros_like(weight) if weight.grad is None else weight.grad,
            )
            for name, weight in weights.items()
        }
    finally:
        network.zero_grad()
