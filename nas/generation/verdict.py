"""Which of the drafted tokens stand, and what follows them.

Shapes: K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nas.generation.plain import draw

Recount = Callable[[int], int]
"""Returns the token behind the first so many drafted ones, as decoding step by step finds it."""


def greedy_verdict(
    drafted: Sequence[int], logits_V: Tensor, near: float, recount: Recount
) -> tuple[int, int]:
    """Return how many drafted tokens are the target's own choice, and its choice behind them.

    Args:
        drafted: K token ids.
        logits_V: the target's logits (K + 1, V) before each of them and behind the last.
        near: two logits nearer than that may come in the other order when computed step by step.
        recount: asked for the choice where the two best are that near.
    """
    best = logits_V.topk(2)
    tokens, gaps = best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()
    for place, token in enumerate(tokens):
        if gaps[place] <= near:
            token = recount(place)
        if place == len(drafted) or token != drafted[place]:
            return place, token
    raise AssertionError("there is one row of logits more than drafted tokens")


def sampling_verdict(
    drafted: Sequence[int],
    draft_probs: Sequence[Tensor],
    target_probs: Tensor,
    generator: torch.Generator | None,
) -> tuple[int, int]:
    """Return how many drafted tokens are accepted, and a token behind them.

    A token drawn with probability q is accepted with min(1, p / q); instead of the first that is
    not, one is drawn in proportion to max(0, p - q). Together the tokens have exactly the target's
    distribution p, whatever the draft's.

    Args:
        drafted: K token ids.
        draft_probs: for each of them the probabilities (V,) it was drawn with.
        target_probs: the target's (K + 1, V) at the same places and behind the last.
        generator: draws.

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
    algorithm 1; Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative
    Sampling", algorithm 2.
    """
    chances = torch.rand(len(drafted), generator=generator, dtype=torch.float64).tolist()
    for place, (token, q_V) in enumerate(zip(drafted, draft_probs, strict=True)):
        p_V = target_probs[place]
        if chances[place] * float(q_V[token]) < float(p_V[token]):
            continue
        rest_V = (p_V - q_V).clamp_min(0.0)
        # Equal distributions leave nothing but what rounding left; then p is as good.
        return place, draw(rest_V if float(rest_V.sum()) > 0 else p_V, generator)
    return len(drafted), draw(target_probs[-1], generator)
