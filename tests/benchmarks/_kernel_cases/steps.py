"""One token of a recurrence with a state: the state is read and written once.

Shapes: B sequences, H heads, D features; C channels, S numbers of state per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kernels import delta_rule, linear_attention, selective_scan
from tests.benchmarks._kernel_cases.case import OURS, Case, Contender, Inputs, Setting

FAMILY = "single_step"
WIDTH = 128
BATCHES = [64, 1]


def cases(setting: Setting) -> list[Case]:
    """Return one token of gla, of the delta rule and of a selective scan."""
    batches = [2] if setting.quick else BATCHES
    found = []
    for batch in batches:
        heads = 2 if setting.quick else 32
        found += [_heads(setting, kind, batch, heads) for kind in ("gla", "deltanet")]
        found.append(_channels(setting, batch, 24 if setting.quick else 4096))
    return found


def _heads(setting: Setting, kind: str, batch: int, heads: int) -> Case:
    width = 16 if setting.quick else WIDTH
    extra = "gate" if kind == "gla" else "beta"
    step = linear_attention.step if kind == "gla" else delta_rule.step

    def inputs() -> Inputs:
        given: Inputs = {name: setting.normal(batch, heads, width) for name in ("q", "k", "v")}
        if kind == "gla":
            gate = setting.normal(batch, heads, width, dtype=torch.float32)
            given["gate"] = F.logsigmoid(gate) / 16
        else:
            given["k"] = F.normalize(given["k"].float(), dim=-1).bfloat16()
            given["beta"] = torch.sigmoid(setting.normal(batch, heads))
        given["state"] = setting.normal(batch, heads, width, width, dtype=torch.float32)
        return given

    def run(given: Inputs, implementation: str) -> Any:
        state = given["state"].clone()
        arguments = [given[name] for name in ("q", "k", "v", extra)]
        return lambda: (step(*arguments, state, implementation=implementation), state)

    def defined(q: Tensor, k: Tensor, v: Tensor, other: Tensor, state: Tensor) -> Any:
        if kind == "gla":
            after = state * other.exp()[..., None] + k[..., None] * v[:, :, None]
        else:
            stored = (state * k[..., None]).sum(dim=2)
            after = state + (other[..., None] * k)[..., None] * (v - stored)[:, :, None]
        return (q[..., None] * after).sum(dim=2), after

    def in_place(q: Tensor, k: Tensor, v: Tensor, other: Tensor, state: Tensor) -> Any:
        out, after = defined(q, k, v, other, state)
        return out, state.copy_(after)

    def compiled(fast: Any, given: Inputs) -> Any:
        state = given["state"].clone()
        arguments = [given[name] for name in ("q", "k", "v", extra)]
        return lambda: fast(*arguments, state)

    return Case(
        family=FAMILY,
        name=f"{kind}, batch {batch} heads {heads}x{width}",
        inputs=inputs,
        reference=lambda given: defined(*(given[name] for name in ("q", "k", "v", extra, "state"))),
        contenders=(
            Contender(OURS, lambda given: run(given, setting.kernel)),
            setting.compiled("torch.compile", in_place, compiled),
            Contender("torch", lambda given: run(given, "reference")),
            Contender("fla", _fla(kind), setting.needs("fla")),
        ),
        min_bytes=8.0 * batch * heads * width * width,
        targets=("memory",) if batch > 1 else (),
    )


def _fla(kind: str) -> Any:
    """Return flash-linear-attention's recurrent kernel on one token; it writes a new state."""

    def build(given: Inputs) -> Any:
        from fla.ops.delta_rule import fused_recurrent_delta_rule
        from fla.ops.gla import fused_recurrent_gla

        q, k, v = (given[name][:, None] for name in ("q", "k", "v"))
        state = given["state"].clone()
        options = {"scale": 1.0, "initial_state": state, "output_final_state": True}

        def call() -> tuple[Tensor, Tensor]:
            if kind == "gla":
                out, after = fused_recurrent_gla(q, k, v, given["gate"][:, None], **options)
            else:
                beta = given["beta"][:, None]
                out, after = fused_recurrent_delta_rule(q, k, v, beta, **options)
            return out[:, 0], after

        return call

    return build


def _channels(setting: Setting, batch: int, channels: int) -> Case:
    states = 4 if setting.quick else 16
    names = ("x", "delta", "a", "write", "read")

    def inputs() -> Inputs:
        delta = F.softplus(setting.normal(batch, channels, dtype=torch.float32) - 3)
        rates = -torch.arange(1.0, states + 1, device=setting.device)
        given: Inputs = {"x": setting.normal(batch, channels), "delta": delta.bfloat16()}
        given["a"] = rates.expand(channels, states).contiguous()
        given |= {name: setting.normal(batch, states) for name in ("write", "read")}
        given["state"] = setting.normal(batch, channels, states, dtype=torch.float32)
        return given

    def run(given: Inputs, implementation: str) -> Any:
        state = given["state"].clone()
        arguments = [given[name] for name in names]
        return lambda: (
            selective_scan.step(*arguments, state, implementation=implementation),
            state,
        )

    return Case(
        family=FAMILY,
        name=f"selective scan, batch {batch} channels {channels}x{states}",
        inputs=inputs,
        reference=lambda given: run(given, "reference")(),
        contenders=(
            Contender(OURS, lambda given: run(given, setting.kernel)),
            Contender("torch", lambda given: run(given, "reference")),
        ),
        min_bytes=8.0 * batch * channels * states,
        priority=2,
    )
