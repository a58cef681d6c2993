"""How far the largest query, key and value stand out over tokens."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def head_confidence(probe: Probe) -> float:
    """Return the sum over layers and projections of ``mean_{b, c} max_t p[b, t, c]``.

    p is the output of a mixer's query, key or value projection, whichever of them it has, with the
    weights brought to unit variance: b counts sequences, c channels, t tokens (padding left out).
    The source's formula speaks of a head's largest attention weight, but its code looks at the
    projections, and so does this: a recurrent mixer that reads a token through such projections has
    a value too. A mixer without any adds nothing; 0 is the value of a network without any. Tokens
    of the opposite sign everywhere would make it negative.

    The source draws all weights with the same deviation, whatever the width, so that the outputs
    grow with the width of the stream; unit variance keeps that at any initialisation.

    Source: Serianni and Kalita 2023, "Training-free Neural Architecture Search for RNNs and
    Transformers", section on attention confidence, as their published code computes it.
    """
    return sum(probe.forward_pass.projections.values())
