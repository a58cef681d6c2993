"""How differently the mixers respond to different sequences.

Shapes: B sequences.
"""

from __future__ import annotations

import numpy as np

from predictors.zero_cost.forward_pass import EMBEDDING
from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError

EPSILON = 1e-5


def hidden_covariance(probe: Probe) -> float:
    """Return the mean over mixers of ``-sum_i [log(v_i + k) + 1 / (v_i + k)]``, k = 1e-5.

    v are the eigenvalues of the correlations between sequences of the mixer's outputs, stacked
    over time (padding counts as 0): what the hidden states of a recurrent layer are to the source,
    any mixer has. The source scores the layers one by one and finds the first best, in networks of
    equal depth whose layers are alike; here layers differ, so all count, by their mean. Without
    any mixer it is the embedded inputs that are compared.

    Source: Serianni and Kalita 2023, "Training-free Neural Architecture Search for RNNs and
    Transformers", section on hidden covariance.

    Raises:
        UserError: for fewer than two sequences, or a mixer whose output does not vary.
    """
    found = dict(probe.forward_pass.hidden_correlations)
    embedded_BB = found.pop(EMBEDDING)
    if len(embedded_BB) < 2:
        raise UserError(
            "hidden_covariance compares sequences, but the batch has one; give at least two"
        )
    scores = []
    for name, correlations_BB in (found or {EMBEDDING: embedded_BB}).items():
        if not bool(correlations_BB.isfinite().all()):
            raise UserError(f"the output of {name} is the same throughout one of the sequences")
        values = np.linalg.eigvalsh(correlations_BB.numpy()).clip(min=0.0) + EPSILON
        scores.append(float(-(np.log(values) + 1.0 / values).sum()))
    return sum(scores) / len(scores)
