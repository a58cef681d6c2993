"""How much of its attention a query gives to one key."""

from __future__ import annotations

from predictors.zero_cost.probe import Probe


def softmax_confidence(probe: Probe) -> float:
    """Return the sum over layers of ``mean_{b, h, t} max_s a[b, h, t, s]``.

    a are the attention weights of a softmax over keys s: b counts sequences, h heads, t queries
    (padding left out). Mixers without such a softmax (see `Mixer.attention_probs`) add nothing, so
    a network without any has the least value, 0.

    Source: Voita et al. 2019, "Analyzing Multi-Head Self-Attention" (confidence of a head); Behnke
    and Heafield 2020, "Losing Heads in the Lottery"; summed up as in Serianni and Kalita 2023,
    whose code takes the maximum over heads, though.
    """
    return sum(probe.forward_pass.attention.values())
