"""Causal states that hold keys and values, in buffers of fixed size.

Shapes: B batch, T new tokens, G key/value heads, S stored tokens, K head width, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from searchspace.errors import UserError
from searchspace.mixers.base import MixerState


def store(buffer_BGSK: Tensor, new_BGTK: Tensor, at: int) -> Tensor:
    """Write tokens from slot `at` on, in place, and return the buffer.

    A module in a wider dtype than the buffer widens it; a narrower one (autocast) does not.
    """
    dtype = torch.promote_types(buffer_BGSK.dtype, new_BGTK.dtype)
    buffer_BGSK = buffer_BGSK.to(dtype)
    buffer_BGSK[:, :, at : at + new_BGTK.shape[2]] = new_BGTK
    return buffer_BGSK


def require_room(room: int, tokens: int) -> None:
    """Raise a `UserError` when more tokens come than a state was made for."""
    if tokens > room:
        raise UserError(
            f"the state holds {room} tokens, {tokens} were given; make it with a larger max_tokens"
        )


@dataclass(kw_only=True)
class KeyValueCache(MixerState):
    """Keys (positions applied) and values of every token so far.

    Args:
        k_BGSK: keys.
        v_BGSK: values; None where they are the keys.
    """

    by_position: ClassVar = frozenset({"k_BGSK", "v_BGSK"})

    k_BGSK: Tensor
    v_BGSK: Tensor | None = None

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return keys and values of all.

        Raises:
            UserError: when there is no room for them.
        """
        start, end = self.length, self.length + k_BGTK.shape[2]
        require_room(self.k_BGSK.shape[2], end)
        self.length = end
        self.k_BGSK = store(self.k_BGSK, k_BGTK, start)
        keys = self.k_BGSK[:, :, :end].to(k_BGTK.dtype)
        if self.v_BGSK is None:
            return keys, keys
        self.v_BGSK = store(self.v_BGSK, v_BGTK, start)
        return keys, self.v_BGSK[:, :, :end].to(v_BGTK.dtype)


@dataclass(kw_only=True)
class BorrowedCache(MixerState):
    """What a layer that shares another one's keys and values attends to when it runs alone.

    Zeros of the size the real ones would have, so that it can be timed; no bytes of its own.
    """

    by_position: ClassVar = frozenset({"k_BGSK", "v_BGSK"})

    k_BGSK: Tensor
    v_BGSK: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: in a network the provider's cache is the only one."""
        return {}

    def take(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Count new tokens and return zero keys and values for all.

        Raises:
            UserError: when there is no room for them.
        """
        require_room(self.k_BGSK.shape[2], self.length + tokens)
        self.length += tokens
        return self.k_BGSK[:, :, : self.length], self.v_BGSK[:, :, : self.length]


@dataclass(kw_only=True)
class SegmentCache(MixerState):
    """Keys and values of the current segment of `segment` tokens; a full one is forgotten."""

    k_BGSK: Tensor
    v_BGSK: Tensor
    segment: int

    @property
    def held(self) -> int:
        """Tokens of the current segment that are stored."""
        return self.length % self.segment

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; returns keys and values from the current segment's first token on.

        Raises:
            UserError: when there is no room for them.
        """
        held, tokens, room = self.held, k_BGTK.shape[2], self.k_BGSK.shape[2]
        if room < self.segment:
            require_room(room, self.length + tokens)
        self.length += tokens
        if held + tokens <= self.segment:
            self.k_BGSK = store(self.k_BGSK, k_BGTK, held)
            self.v_BGSK = store(self.v_BGSK, v_BGTK, held)
            end = held + tokens
            keys, values = self.k_BGSK[:, :, :end], self.v_BGSK[:, :, :end]
            return keys.to(k_BGTK.dtype), values.to(v_BGTK.dtype)
        keys = torch.cat([self.k_BGSK[:, :, :held].to(k_BGTK.dtype), k_BGTK], dim=2)
        values = torch.cat([self.v_BGSK[:, :, :held].to(v_BGTK.dtype), v_BGTK], dim=2)
        if rest := self.held:
            self.k_BGSK = store(self.k_BGSK, keys[:, :, -rest:], 0)
            self.v_BGSK = store(self.v_BGSK, values[:, :, -rest:], 0)
        return keys, values


@dataclass(kw_only=True)
class WindowCache(MixerState):
    """Keys and values of the newest tokens, and of the first ones where those stay visible.

    Args:
        k_BGSK: keys of the newest tokens, the last one at the end whatever the fill.
        v_BGSK: values.
        global_k_BGSK: keys of the first tokens of the sequence; None where they do not stay.
        global_v_BGSK: values.
    """

    k_BGSK: Tensor
    v_BGSK: Tensor
    global_k_BGSK: Tensor | None = None
    global_v_BGSK: Tensor | None = None

    @property
    def held(self) -> int:
        """Newest tokens that are stored."""
        return min(self.length, self.k_BGSK.shape[2])

    @property
    def num_global(self) -> int:
        """First tokens of the sequence that are stored."""
        return 0 if self.global_k_BGSK is None else min(self.length, self.global_k_BGSK.shape[2])

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; returns `num_global`, `held` (as before the call) and new tokens."""
        keys = self._with_stored(self.global_k_BGSK, self.k_BGSK, k_BGTK)
        values = self._with_stored(self.global_v_BGSK, self.v_BGSK, v_BGTK)
        if self.global_k_BGSK is not None and self.global_v_BGSK is not None:
            first, room = self.num_global, self.global_k_BGSK.shape[2]
            self.global_k_BGSK = store(self.global_k_BGSK, k_BGTK[:, :, : room - first], first)
            self.global_v_BGSK = store(self.global_v_BGSK, v_BGTK[:, :, : room - first], first)
        skip = self.num_global
        self.k_BGSK = _keep_last(self.k_BGSK, keys[:, :, skip:])
        self.v_BGSK = _keep_last(self.v_BGSK, values[:, :, skip:])
        self.length += k_BGTK.shape[2]
        return keys, values

    def _with_stored(self, first_BGSK: Tensor | None, last_BGSK: Tensor, new: Tensor) -> Tensor:
        parts = [last_BGSK[:, :, last_BGSK.shape[2] - self.held :].to(new.dtype), new]
        if first_BGSK is not None:
            parts.insert(0, first_BGSK[:, :, : self.num_global].to(new.dtype))
        return torch.cat(parts, dim=2)


def _keep_last(buffer_BGSK: Tensor, new_BGTK: Tensor) -> Tensor:
    """Return a buffer of the same size with the newest of `new_BGTK` at its end."""
    room = min(buffer_BGSK.shape[2], new_BGTK.shape[2])
    if room == buffer_BGSK.shape[2]:
        dtype = torch.promote_types(buffer_BGSK.dtype, new_BGTK.dtype)
        return new_BGTK[:, :, new_BGTK.shape[2] - room :].to(dtype)
    return store(buffer_BGSK, new_BGTK[:, :, -room:], buffer_BGSK.shape[2] - room)
