"""How close the layers are to linear maps of the residual stream.

Shapes: N tokens, D d_model, P principal components.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from predictors.zero_cost.forward_pass import EMBEDDING
from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError

MAX_ROWS = 256

RANK_TOLERANCE = 1e-10
"""Of the largest variance of a component; rounding of float32 stays far below."""


def block_linearity(probe: Probe) -> float:
    """Return the mean over layers of ``1 - min_A ||X A - Y||^2``: how linear the layers are.

    X and Y are the stream before and after a layer (its mixer and its FFN), tokens x channels,
    centred and of Frobenius norm 1; padding is left out. A fit with as many unknowns as tokens is
    always perfect, so X and Y are first brought to their leading ``(N - 1) / 2`` principal
    components where the stream has more (`d_model` above half of the tokens), and the error is
    divided by the degrees of freedom that are left. 1 is a network of linear layers; one without
    any has 0. In training, the source finds, less linear layers are better; at random weights
    the layers of a deep network are each closer to linear than those of a shallow one, and more
    linear goes with better on NAS-Bench-BERT.

    Source: Razzhigaev et al. 2024, "Your Transformer is Secretly Linear", section 3.1; training
    that makes layers less linear helps in its section 4. The correction is that of the adjusted
    R^2.

    Raises:
        UserError: for fewer than three tokens, or where all tokens are equal.
    """
    layers = layer_streams(probe)
    if len(layers) < 2:
        return 0.0
    scores = [principal_scores(name, rows_ND) for name, rows_ND in layers.items()]
    found = [linearity(x, y) for x, y in itertools.pairwise(scores)]
    return sum(found) / len(found)


def layer_streams(probe: Probe) -> dict[str, Tensor]:
    """Return the stream as embedded and after every layer, at most `MAX_ROWS` tokens of it."""
    streams = probe.forward_pass.streams
    step = -(-len(streams[EMBEDDING]) // MAX_ROWS)
    # The last of a layer's two blocks stays.
    return {name.split("_")[0]: rows_ND[::step] for name, rows_ND in streams.items()}


def principal_scores(name: str, rows_ND: Tensor) -> Tensor:
    """Return the centred rows in coordinates of their leading components, (N, P), float64.

    Their Frobenius norm is 1. P is at most ``(N - 1) / 2``, and the number that varies at all.
    """
    num_rows = len(rows_ND)
    if num_rows < 3:
        raise UserError(
            f"block_linearity fits a map to tokens, but the batch has {num_rows}; give at least 3"
        )
    rows_ND = rows_ND.double()
    centred_ND = rows_ND - rows_ND.mean(dim=0)
    size = float(centred_ND.norm())
    if size <= RANK_TOLERANCE * float(rows_ND.norm()):
        raise UserError(f"the residual stream after {name} is the same for all tokens")
    centred_ND = centred_ND / size
    wide = centred_ND.shape[1] > num_rows
    gram = centred_ND @ centred_ND.T if wide else centred_ND.T @ centred_ND
    values, vectors = torch.linalg.eigh(gram)
    there = int((values > RANK_TOLERANCE * values[-1]).sum())
    chosen = slice(len(values) - min(there, (num_rows - 1) // 2), None)
    if wide:
        scores_NP = vectors[:, chosen] * values[chosen].sqrt()
    else:
        scores_NP = centred_ND @ vectors[:, chosen]
    return scores_NP / scores_NP.norm()


def linearity(x_NP: Tensor, y_NQ: Tensor) -> float:
    """Return the share of y that a linear map of x explains, adjusted for its unknowns."""
    # The columns of x are orthogonal: the fit is a projection onto each of them.
    fitted_PQ = (x_NP / x_NP.norm(dim=0)).T @ y_NQ
    error = max(0.0, 1.0 - float(fitted_PQ.square().sum()))
    num_rows, unknowns = x_NP.shape
    return 1.0 - error * (num_rows - 1) / (num_rows - 1 - unknowns)
