"""States whose tensors grow with the tokens: the form in which a graph takes and returns them.

PyTorch's caches are buffers for the longest sequence and know how full they are. A graph returns
what is in them and nothing else.

Shapes: B batch, T new tokens, G key/value heads, S stored tokens, K head width, E sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from searchspace.mixers.aft import AftCache
from searchspace.mixers.kv_cache import KeyValueCache, SegmentCache, WindowCache

Size = int | torch.SymInt


@dataclass(kw_only=True)
class GrowingKeyValues(KeyValueCache):
    """`KeyValueCache` without room to spare."""

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return keys and values of all."""
        self.length += k_BGTK.shape[2]
        self.k_BGSK = torch.cat([self.k_BGSK, k_BGTK], dim=2)
        if self.v_BGSK is None:
            return self.k_BGSK, self.k_BGSK
        self.v_BGSK = torch.cat([self.v_BGSK, v_BGTK], dim=2)
        return self.k_BGSK, self.v_BGSK


@dataclass(kw_only=True)
class GrowingWindow(WindowCache):
    """`WindowCache` without room to spare.

    Args:
        reach: newest tokens that are kept.
        num_first: first tokens of the sequence that are kept.
    """

    reach: int
    num_first: int

    @property
    def held(self) -> int:
        """Newest tokens that are stored."""
        return self.k_BGSK.shape[2]

    @property
    def num_global(self) -> int:
        """First tokens of the sequence that are stored."""
        return 0 if self.global_k_BGSK is None else self.global_k_BGSK.shape[2]

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; see `WindowCache.extend`."""
        keys, self.k_BGSK = self._with_new(self.k_BGSK, k_BGTK)
        values, self.v_BGSK = self._with_new(self.v_BGSK, v_BGTK)
        if self.global_k_BGSK is not None and self.global_v_BGSK is not None:
            first_k, first_v = self.global_k_BGSK, self.global_v_BGSK
            keys, values = torch.cat([first_k, keys], dim=2), torch.cat([first_v, values], dim=2)
            self.global_k_BGSK = torch.cat([first_k, k_BGTK], dim=2)[:, :, : self.num_first]
            self.global_v_BGSK = torch.cat([first_v, v_BGTK], dim=2)[:, :, : self.num_first]
        self.length += k_BGTK.shape[2]
        return keys, values

    def _with_new(self, held_BGSK: Tensor, new_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Return all tokens, and those of them that are kept."""
        tokens = torch.cat([held_BGSK, new_BGTK], dim=2)
        if not self.reach:
            return tokens, held_BGSK
        # A negative start would be taken to lie within the tokens, however few there are.
        return tokens, tokens[:, :, torch.sym_max(tokens.shape[2] - self.reach, 0) :]


@dataclass(kw_only=True)
class GrowingSegment(SegmentCache):
    """`SegmentCache` without room to spare."""

    @property
    def held(self) -> int:
        """Tokens of the current segment that are stored."""
        return self.k_BGSK.shape[2]

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; see `SegmentCache.extend`."""
        keys = torch.cat([self.k_BGSK, k_BGTK], dim=2)
        values = torch.cat([self.v_BGSK, v_BGTK], dim=2)
        self.length += k_BGTK.shape[2]
        first = keys.shape[2] - self.length % self.segment
        self.k_BGSK, self.v_BGSK = keys[:, :, first:], values[:, :, first:]
        return keys, values


@dataclass(kw_only=True)
class GrowingAft(AftCache):
    """`AftCache` without room to spare."""

    def append(self, new_BTE: Tensor) -> Tensor:
        """Store new tokens and return those of all."""
        self.length += new_BTE.shape[1]
        self.sums_BSE = torch.cat([self.sums_BSE, new_BTE], dim=1)
        return self.sums_BSE


def growing(state: Any, length: Size, empty: Callable[..., Tensor]) -> Any:
    """Return a state in the form of a graph.

    Args:
        state: as a mixer or FFN makes it, for more tokens than any window or segment has.
        length: tokens that it holds.
        empty: makes a tensor of a shape and dtype.
    """
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    values["length"] = length

    def sized(axis: int, size: Callable[[int], Size], *names: str) -> None:
        for name in names:
            if isinstance(values[name], Tensor):
                shape = list(values[name].shape)
                shape[axis] = size(shape[axis])
                values[name] = empty(shape, values[name].dtype)

    made: Any = type(state)
    if isinstance(state, KeyValueCache):
        made = GrowingKeyValues
        sized(2, lambda room: length, "k_BGSK", "v_BGSK")
    elif isinstance(state, WindowCache):
        made, first = GrowingWindow, state.global_k_BGSK
        values |= {
            "reach": state.k_BGSK.shape[2],
            "num_first": 0 if first is None else first.shape[2],
        }
        names = "k_BGSK", "v_BGSK", "global_k_BGSK", "global_v_BGSK"
        sized(2, lambda room: torch.sym_min(length, room), *names)
    elif isinstance(state, SegmentCache):
        made = GrowingSegment
        sized(2, lambda room: length % state.segment, "k_BGSK", "v_BGSK")
    elif isinstance(state, AftCache):
        made = GrowingAft
        sized(1, lambda room: length, "sums_BSE")
    return made(**values)
