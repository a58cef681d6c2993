"""How differently the network responds to different sequences, by its input Jacobians."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError

EPSILON = 1e-5


def jacob_cov(probe: Probe) -> float:
    """Return ``-sum_i [log(v_i + k) + 1 / (v_i + k)]``, v the eigenvalues of J's correlations.

    Row b of J is the gradient of the sum of all logits with respect to the embedded tokens of
    sequence b; k = 1e-5. The head is random and not normalised, so the sum of the logits is a
    random projection of the last hidden state, not a constant.

    Source: Mellor et al. 2020, "Neural Architecture Search without Training" (first version),
    section 3; constants as in Abdelfattah et al. 2021.

    Raises:
        UserError: for a single sequence, one to which the network does not respond at all, or a
            response that is not finite.
    """
    values = np.linalg.eigvalsh(np.corrcoef(jacobian_rows(probe))).clip(min=0.0) + EPSILON
    return float(-(np.log(values) + 1.0 / values).sum())


def jacobian_rows(probe: Probe) -> NDArray[np.float64]:
    """Return J: for every sequence the flattened gradient by its embedded tokens.

    Raises:
        UserError: as `jacob_cov`.
    """
    rows: NDArray[np.float64] = probe.loss_pass.jacobian_BTD.double().flatten(1).numpy()
    if len(rows) < 2:
        raise UserError("the metric compares sequences, but the batch has one; give at least two")
    if not np.isfinite(rows).all():
        raise UserError("the gradient of the outputs by the embedded tokens is not finite")
    if not (rows.std(axis=1) > 0).all():
        raise UserError("the network's output does not depend on one of the sequences")
    return rows
