"""How strongly the network's features answer to a small change of a random input.

Shapes: B sequences, T tokens, D d_model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError
from searchspace.linear import Linear

STEP = 0.01
MAX_TOKENS = 128
"""Of all sequences together; at least one token."""


def zen(probe: Probe) -> float:
    """Return ``log mean |f(x) - f(x + 0.01 e)|`` for standard normal weights, x and e.

    f is the residual stream after the last layer. x stands in the place of the embedded tokens or
    patches, which have no small changes of their own; up to 128 tokens of it are looked at, in
    sequences as long as the batch's where that many are enough. Every linear map's weight, drawn
    from a normal, is brought to unit variance; other parameters stay as training begins with them.

    The source's batch norms keep its values finite and are undone by adding the logarithms of
    their deviations. Here the network's own norms do the former, and nothing is added: in front of
    a residual branch, not on the stream itself, they are no factor that could be taken out.

    Source: Lin et al. 2021, "Zen-NAS: A Zero-Shot NAS for High-Performance Image Recognition",
    definition 1 and algorithm 1 (the latter's lines 5-6 left out).

    Raises:
        UserError: where the features do not answer, or are not finite.
    """
    generator = torch.Generator().manual_seed(probe.seed)
    # In float64: norms behind large weights amplify the rounding of a difference this small.
    network = probe.copy_network()
    with torch.no_grad():
        for module in network.blocks.modules():
            if isinstance(module, Linear):
                # It is normal already; only its size is not.
                module.weight /= module.weight.square().mean().sqrt()
        x_BTD = _gaussian_stream(probe, generator)
        noise_BTD = torch.randn(x_BTD.shape, generator=generator, dtype=x_BTD.dtype)
        changed_BTD = x_BTD + STEP * noise_BTD
        difference_BTD = network.run_layers(x_BTD) - network.run_layers(changed_BTD)
        change = float(difference_BTD.abs().mean())
    if not 0.0 < change < math.inf:
        raise UserError(f"features of standard normal weights change by {change}")
    return math.log(change)


def _gaussian_stream(probe: Probe, generator: torch.Generator) -> Tensor:
    tokens = min(probe.num_tokens, MAX_TOKENS)
    batch = max(1, min(len(probe.inputs), MAX_TOKENS // tokens))
    shape = batch, tokens, probe.arch.d_model
    return torch.randn(shape, generator=generator, dtype=torch.float64)
