"""How well the size of the residual stream is kept from end to end.

Shapes: N tokens, D d_model.
"""

from __future__ import annotations

import math

from predictors.zero_cost.probe import Probe
from searchspace.errors import UserError


def signal_propagation(probe: Probe) -> float:
    """Return minus the mean of ``|ln v_l|`` over the stream as embedded and after every block.

    v_l is the stream's second moment there, over tokens (padding left out) and channels. A stream
    of unit variance from end to end has the greatest value, 0; one that grows or shrinks with
    depth has less. Only forward moments are looked at; the source keeps those of gradients too.

    Source: Kedia et al. 2024, "Transformers Get Stable: An End-to-End Signal Propagation Theory for
    Language Models", sections on moments through blocks and on DeepScaleLM, which keeps them at 1.

    Raises:
        UserError: where the stream vanishes.
    """
    drift = 0.0
    streams = probe.forward_pass.streams
    for name, rows_ND in streams.items():
        moment = float(rows_ND.double().square().mean())
        if moment == 0:
            raise UserError(f"the residual stream after {name} is 0 at random weights")
        drift += abs(math.log(moment))
    return -drift / len(streams)
