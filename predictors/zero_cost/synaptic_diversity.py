"""How many directions the weights of token mixers have, and learn in."""

from __future__ import annotations

from predictors.zero_cost.loss_pass import linears_inside
from predictors.zero_cost.nuclear import nuclear_product
from predictors.zero_cost.probe import Probe
from searchspace.sub_blocks import MixerBlock


def synaptic_diversity(probe: Probe) -> float:
    """Return ``sum ||W||_* ||dL/dW||_*`` over the linear maps of all token mixers.

    The maps of any mixer take the place of attention's queries, keys, values and output: gates too.
    A network whose mixers have none (pooling, Fourier) gets 0, the least possible value. L is the
    task loss: the sum of a last LayerNorm's outputs, which published scores of language models were
    computed with, is constant.

    Source: Zhou et al. 2022, "Training-free Transformer Architecture Search", synaptic diversity of
    self-attention; for language models Serianni and Kalita 2023, "Training-free Neural Architecture
    Search for RNNs and Transformers".
    """
    done = probe.loss_pass
    names = sorted(linears_inside(probe.network, MixerBlock))
    return sum(nuclear_product(done.weights[name], done.gradients[name]) for name in names)
