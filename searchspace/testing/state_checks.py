"""The checks of `check_operator` about operators with a state: mixers, and some FFNs.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch

from searchspace.mixers import MIXERS
from searchspace.packing import pack
from searchspace.specs import MixerSpec
from searchspace.subnet import state_bytes
from searchspace.testing.operator_checks import (
    NUM_TOKENS,
    Spec,
    bound_of,
    make_block,
    make_input,
    require,
    require_close,
)

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
    if isinstance(spec, MixerSpec) and spec.kv_shared:
        return  # its keys and values come from another layer; see the supernet check
    for packed in (False, True) if spec.precision != "fp32" else (False,):
        block = make_block(spec)
        if packed:
            pack(block)
        expected = block(x_BTD)
        for split in SPLITS:
            state: Any = block.init_state(x_BTD.shape[0], NUM_TOKENS)
            out = torch.cat(
                [block(part, state) for part in torch.split(x_BTD, list(split), dim=1)], dim=1
            )
            what = f"calls of {split[:9]} tokens{' as stored' if packed else ''}"
            require_close(out, expected, bound_of(spec), what)
            require(state.length == NUM_TOKENS, f"{what}: the state counts {state.length} tokens")


@torch.no_grad()
def check_state_size(spec: Spec) -> None:
    """A state never grows, and a recurrent mixer's does not depend on the number of tokens."""
    block = make_block(spec)
    state = block.init_state(2, NUM_TOKENS)
    made = state_bytes([state])
    borrows = isinstance(spec, MixerSpec) and spec.kv_shared
    has_state = made > 0 or borrows or _mixes_nothing(spec)
    require(has_state, "the state has no tensors")
    for part in torch.split(make_input(), [40, 1, 30], dim=1):
        block(part, state)
        require(state_bytes([state]) == made, f"the state grew from {made} bytes")
    doubled = state_bytes([block.init_state(4, NUM_TOKENS)])
    require(doubled == 2 * made, f"a batch twice as large takes {doubled} bytes, not {2 * made}")
    fixed = MIXERS[spec.mixer].fixed_state if isinstance(spec, MixerSpec) else True
    if fixed:
        long = state_bytes([block.init_state(2, 100 * NUM_TOKENS)])
        require(long == made, f"the state for more tokens takes {long} bytes, not {made}")


def _mixes_nothing(spec: Spec) -> bool:
    """Whether no token reads another one, so that nothing needs to be remembered."""
    x_BTD = make_input(tokens=5)
    changed = x_BTD.clone()
    changed[:, 0] *= -100
    block = make_block(spec)
    return torch.equal(block(changed)[:, 1:], block(x_BTD)[:, 1:])


@torch.no_grad()
def check_rewind(spec: Spec) -> None:
    """A step at some context can be done again and again, on a state that was never filled."""
    block, x_BTD = make_block(spec), make_input(tokens=1)
    state: Any = block.init_state(2, 41)
    outs = []
    for _ in range(2):
        state.length = 40
        outs.append(block(x_BTD, state))
    require(state.length == 41, f"after a step at 40 the state counts {state.length} tokens")
    finite = all(bool(torch.isfinite(out).all()) for out in outs)
    require(finite, "a step on an unfilled state is not finite")
