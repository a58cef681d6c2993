"""Pooling over the tokens around each one, without parameters.

Shapes: B batch, T tokens, D d_model, W window.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.mixers._windows import sides
from searchspace.mixers.base import Mixer, MixerState


@dataclass(kw_only=True)
class PoolState(MixerState):
    """The last W - 1 tokens; what counts for nothing stands where there were none."""

    last_BTD: Tensor


class WindowPool(Mixer):
    """Base of pooling over a window of tokens (see `_windows` for which those are).

    Which tokens are neighbours decides the result, so the order counts; in the centred form with
    an odd window a sequence and its mirror image are treated alike.
    """

    heads: ClassVar = "none"
    ordered: ClassVar = True
    has_linears: ClassVar = False
    fixed_state: ClassVar = True
    options: ClassVar[dict[str, Any]] = {"window": 3}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"window": (2, 3, 4, 5, 7, 9, 16)}
    neutral: ClassVar[float] = 0.0
    """What stands for tokens that are not there."""

    def init_state(
        self, batch: int, max_tokens: int, device: torch.device | None = None
    ) -> PoolState:
        """Return the state before the first token; its size does not depend on `max_tokens`."""
        shape = (batch, self.option("window") - 1, self.spec.d_model)
        return PoolState(last_BTD=torch.full(shape, self.neutral, device=device))

    def windows(self, x_BTD: Tensor, state: PoolState | None) -> list[Tensor]:
        """Return W tensors (B, T, D): each token's neighbours, from the earliest to the latest."""
        window, tokens = int(self.option("window")), x_BTD.shape[1]
        if state is None:
            padding = (0, 0, *sides(window, self.causal))
            padded = F.pad(x_BTD, padding, value=self.neutral)
        else:
            padded = torch.cat([state.last_BTD.to(x_BTD.dtype), x_BTD], dim=1)
            # A copy, so that the state does not keep whole prompts alive.
            state.last_BTD = padded[:, tokens:].to(state.last_BTD.dtype, copy=True)
            state.length += tokens
        return [padded[:, tap : tap + tokens] for tap in range(window)]


class AveragePool(WindowPool):
    """The average of the tokens of the window minus the own one.

    Source: Yu et al. 2022, "MetaFormer Is Actually What You Need for Vision", equation 4.
    """

    def forward(self, x_BTD: Tensor, state: PoolState | None = None) -> Tensor:
        """Average the tokens that there are."""
        start, tokens = 0 if state is None else state.length, x_BTD.shape[1]
        total_BTD = functools.reduce(torch.add, self.windows(x_BTD, state))
        before, after = sides(int(self.option("window")), self.causal)
        position_T = torch.arange(start, start + tokens, device=x_BTD.device)
        count_T = position_T.clamp(max=before) + 1
        count_T = count_T + (start + tokens - 1 - position_T).clamp(max=after)
        return total_BTD / count_T[:, None].to(total_BTD.dtype) - x_BTD


class MaxPool(WindowPool):
    """The largest value of each feature in the window.

    Source: Han et al. 2022, "Learning Features with Parameter-Free Layers", section 3 (max-pool in
    the place of self-attention).
    """

    neutral: ClassVar = -math.inf

    def forward(self, x_BTD: Tensor, state: PoolState | None = None) -> Tensor:
        """Take the largest values of the tokens that there are."""
        return functools.reduce(torch.maximum, self.windows(x_BTD, state))
