"""Padding for operators that know no masks: rows of equal true length run together, without it.

Shapes: B batch, T new tokens, S tokens so far, V vocabulary, N rows of a group.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from searchspace.subnet import Subnet

MIN_ROOM = 64
"""Tokens for which a state is made at least."""


@dataclass
class Group:
    """Rows of a batch whose sequences have the same length, padding not counted.

    Args:
        rows: their places in the batch (N,).
        tokens_NS: what the network has seen of them.
        state: of the network after these tokens; None before the first.
        room: tokens that the state was made for.
    """

    rows: Tensor
    tokens_NS: Tensor
    state: list[Any] | None = None
    room: int = 0

    def select(self, places: Tensor, rows: Tensor) -> Group:
        """Return a group of copies of some of these rows, which then stand at other `rows`."""
        state = None if self.state is None else [_select(part, places) for part in self.state]
        return replace(self, rows=rows, tokens_NS=self.tokens_NS[places], state=state)

    def run(self, network: Subnet, tokens_NT: Tensor, room: int, keep: int) -> Tensor:
        """Return the logits of the next tokens, (N, T, V), or of the last `keep` if not 0.

        Args:
            network: a decoder.
            tokens_NT: the tokens.
            room: tokens that a new state is made for, if there are no more; 0 for no state.
            keep: how many of the tokens need logits.
        """
        num_seen = self.tokens_NS.shape[1]
        end = num_seen + tokens_NT.shape[1]
        if room and end > self.room:
            # States are buffers of fixed size, each operator's its own: a larger one is filled
            # anew. As the room doubles, a sequence is read again a few times at most.
            self.room = max(room, 2 * self.room, end)
            self.state = network.init_state(len(self.rows), self.room, tokens_NT.device)
            if num_seen:
                network.features(self.tokens_NS, self.state)
        if room:
            self.tokens_NS = torch.cat([self.tokens_NS, tokens_NT], dim=1)
        x_NTD = network.features(tokens_NT, self.state)
        return network.ends.logits(x_NTD[:, -keep:], tokens_NT)


class RowGroups:
    """What a decoder remembers of a batch; serves as ``past_key_values``.

    Each group has a state of its own, so a step of a padded batch costs one small step for every
    length that occurs in it; a batch without padding is one group. On one core, eight rows of eight
    lengths were measured to take 4.4 times as long for each token as eight rows of one.

    Args:
        max_tokens: columns that are expected; with more, states grow (see `Group.run`).
    """

    is_compileable = False

    def __init__(self, max_tokens: int = 0) -> None:
        self.room = max(max_tokens, MIN_ROOM)
        self.num_columns = 0
        self.groups: list[Group] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns were seen, padding counted."""
        return self.num_columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what is remembered of row `beam_idx[i]`."""
        groups = []
        for group in self.groups:
            place_of = {row: place for place, row in enumerate(group.rows.tolist())}
            kept = [
                (place_of[old], row) for row, old in enumerate(beam_idx.tolist()) if old in place_of
            ]
            if kept:
                places, rows = torch.tensor(kept, device=group.rows.device).unbind(dim=1)
                groups.append(group.select(places, rows))
        self.groups = groups

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = sum(len(group.rows) for group in self.groups)
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def logits(
        self, network: Subnet, input_ids: Tensor, mask_BS: Tensor | None, keep: int = 0
    ) -> Tensor:
        """Return the logits (B, T, V) of the next tokens and remember these.

        Args:
            network: a decoder.
            input_ids: the new columns (B, T).
            mask_BS: 0 where there is padding, for all columns so far; None where there is none.
            keep: how many of the last columns need logits; 0 for all.

        Raises:
            ValueError: for a mask of another shape.
        """
        out_BTV = run_rows(network, input_ids, mask_BS, keep, self)
        self.num_columns += input_ids.shape[1]
        return out_BTV


def run_rows(
    network: Subnet,
    input_ids: Tensor,
    mask_BS: Tensor | None,
    keep: int = 0,
    past: RowGroups | None = None,
) -> Tensor:
    """Return the logits (B, T, V) as of every sequence alone, zero where there is padding.

    Args as of `RowGroups.logits`; `past` is what is remembered, None where nothing is.
    """
    mask_BT = _new_columns(input_ids, mask_BS, 0 if past is None else past.num_columns)
    groups = [] if past is None else past.groups
    if not groups:
        rows = torch.arange(len(input_ids), device=input_ids.device)
        groups = [Group(rows, input_ids[:, :0])]
    if mask_BT is not None:
        groups = _split(groups, mask_BT.sum(dim=1))
    if past is not None:
        past.groups = groups
    room = 0 if past is None else past.room
    if len(groups) == 1 and (mask_BT is None or bool(mask_BT.all())):
        return groups[0].run(network, input_ids, room, keep)
    out: Tensor | None = None
    for group in groups:
        tokens_NT, columns_NT = _without_padding(group, input_ids, mask_BT)
        if not tokens_NT.shape[1]:
            continue
        logits_NTV = group.run(network, tokens_NT, room, 0)
        if out is None:
            out = logits_NTV.new_zeros(*input_ids.shape, logits_NTV.shape[-1])
        out[group.rows[:, None], columns_NT] = logits_NTV
    if out is None:
        raise ValueError("attention_mask is 0 everywhere; give at least one token")
    return out[:, -keep:]


def _new_columns(input_ids: Tensor, mask_BS: Tensor | None, num_columns: int) -> Tensor | None:
    """Return where the new columns hold tokens (B, T); None where they all do."""
    if mask_BS is None:
        return None
    batch, tokens = input_ids.shape
    if mask_BS.shape != (batch, num_columns + tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask_BS.shape)}; give one number for every token so "
            f"far, {(batch, num_columns + tokens)}: 0 for padding, 1 for tokens"
        )
    return mask_BS[:, num_columns:].to(input_ids.device) != 0


def _split(groups: list[Group], count_B: Tensor) -> list[Group]:
    """Return groups whose rows get equally many new tokens."""
    parts = []
    for group in groups:
        count_N = count_B[group.rows]
        counts = count_N.unique().tolist()
        for count in counts:
            places = (count_N == count).nonzero()[:, 0]
            parts.append(group if len(counts) == 1 else group.select(places, group.rows[places]))
    return parts


def _without_padding(
    group: Group, input_ids: Tensor, mask_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the group's new tokens and the columns they stand in, both (N, T or fewer)."""
    mask_NT = torch.ones_like(input_ids, dtype=torch.bool) if mask_BT is None else mask_BT
    mask_NT = mask_NT[group.rows]
    columns_NT = mask_NT.nonzero()[:, 1].view(len(group.rows), -1)
    return input_ids[group.rows].gather(1, columns_NT), columns_NT


def _select(part: Any, places: Tensor) -> Any:
    """Return a copy of a sub-block's state for some rows; the batch is its tensors' first axis."""
    if part is None:
        return None
    chosen = copy.copy(part)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            setattr(chosen, field.name, value.index_select(0, places))
        elif isinstance(value, list):
            setattr(chosen, field.name, list(value))
    return chosen
