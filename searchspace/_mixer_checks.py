"""The checks of `check_operator` about what only mixers have: a state.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch

from searchspace._operator_checks import (
    NUM_TOKENS,
    Spec,
    bound_of,
    make_block,
    make_input,
    require,
    require_close,
)
from searchspace.mixers.recurrent import RecurrentMixer
from searchspace.sub_blocks import pack
from searchspace.subnet import state_bytes

SPLITS = (
    (1,) * NUM_TOKENS,
    (NUM_TOKENS - 1, 1),
    (5, 1, 1, 9, 1, 2, 33, 19),
    (64, 7),
    (1, 70),
    (32, 32, 7),
)
"""Calls that leave windows and chunks partly filled, filled exactly, and single tokens."""


@torch.no_grad()
def check_steps(spec: Spec) -> None:
    """One call with all tokens equals any split into calls that hand the state on."""
    x_BTD = make_input()
    for packed in (False, True) if spec.precision == "int8" else (False,):
        block = make_block(spec)
        if packed:
            pack(block)
        expected = block(x_BTD)
        for split in SPLITS:
            state: Any = block.init_state(x_BTD.shape[0], NUM_TOKENS)
            out = torch.cat(
                [block(part, state) for part in torch.split(x_BTD, list(split), dim=1)], dim=1
            )
            what = f"calls of {split[:9]} tokens{' in real int8' if packed else ''}"
            require_close(out, expected, bound_of(spec), what)
            require(state.length == NUM_TOKENS, f"{what}: the state counts {state.length} tokens")


@torch.no_grad()
def check_state_size(spec: Spec) -> None:
    """A state never grows, and a recurrent mixer's does not depend on the number of tokens."""
    block = make_block(spec)
    state = block.init_state(2, NUM_TOKENS)
    made = state_bytes([state])
    require(made > 0, "the state has no tensors")
    for part in torch.split(make_input(), [40, 1, 30], dim=1):
        block(part, state)
        require(state_bytes([state]) == made, f"the state grew from {made} bytes")
    doubled = state_bytes([block.init_state(4, NUM_TOKENS)])
    require(doubled == 2 * made, f"a batch twice as large takes {doubled} bytes, not {2 * made}")
    if isinstance(block.op, RecurrentMixer):
        long = state_bytes([block.init_state(2, 100 * NUM_TOKENS)])
        require(long == made, f"the state for more tokens takes {long} bytes, not {made}")
