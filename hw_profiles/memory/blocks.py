"""The peak memory of an arch, put together from its sub-blocks.

One sub-block runs at a time. What it needs beside its input is found once, by following its shapes;
an arch's peak is what all its sub-blocks hold all the time, and the most that one of them takes
while it runs. Layers hand keys and values on (`SharedKV`), which then outlive their sub-block.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hw_profiles.memory.dry_run import DryRun
from hw_profiles.memory.tensors import TensorMemory, kept_tensors, storage_bytes
from hw_profiles.tensors import tensors_in
from hw_profiles.workload import Workload
from searchspace.arch import Arch
from searchspace.ends import example_inputs
from searchspace.mixers import MIXERS
from searchspace.mixers.base import SharedKV
from searchspace.packing import pack
from searchspace.specs import EndsSpec, FFNSpec, MixerSpec
from searchspace.sub_blocks import build_sub_block

G = TypeVar("G")


@dataclass(frozen=True)
class BlockMemory:
    """What one sub-block takes.

    Args:
        held_bytes: weights, what kernels keep beside them, and state: there all the time.
        pass_bytes: the most that is alive during its pass beside what is held, constants, the
            input, and the keys and values of earlier layers.
        carried_bytes: keys and values that it leaves to later layers.
        constants: masks and tables that it reads, and may have in common with other sub-blocks.
    """

    held_bytes: int
    pass_bytes: int
    carried_bytes: int
    constants: tuple[Tensor, ...]


def arch_peak_bytes(arch: Arch, workload: Workload) -> int:
    """Return the peak of a pass over an arch's packed network, in bytes, inputs included.

    Raises:
        UserError: when the shape of some operator's result depends on values.
    """
    embed, logits, shape = ends_memory(arch.ends, workload)
    x_bytes, carried_bytes = 4 * shape.numel(), 0
    parts, provider = [embed, logits], None
    most = max(embed.pass_bytes, x_bytes + logits.pass_bytes)
    for _, spec in arch.named_sub_blocks():
        if not isinstance(spec, MixerSpec) or not MIXERS[spec.mixer].shares_kv:
            found = block_memory(spec, workload, shape)
        else:
            found = block_memory(spec, workload, shape, provider)
        parts.append(found)
        most = max(most, x_bytes + carried_bytes + found.pass_bytes)
        if isinstance(spec, MixerSpec) and MIXERS[spec.mixer].shares_kv and not _borrows(spec):
            provider, carried_bytes = spec, found.carried_bytes
    constants = [tensor for part in parts for tensor in part.constants]
    return most + sum(part.held_bytes for part in parts) + storage_bytes(constants)


@functools.cache
def ends_memory(spec: EndsSpec, workload: Workload) -> tuple[BlockMemory, BlockMemory, torch.Size]:
    """Return what embedding and prediction take, and the shape (B, T, D) of what is embedded.

    Weights and network inputs count as held by the embedding.
    """
    ends = _hollow_block(spec)
    inputs = example_inputs(spec, workload.batch, workload.new_tokens)
    start = workload.tokens if workload.phase == "decode" else 0
    stored = [*ends.parameters(), *ends.buffers(), inputs]
    with torch.inference_mode(False), torch.no_grad(), DryRun(stored):
        x_BTD = ends.embed(inputs, start)
        embed, _ = _follow(lambda: None, lambda _: ends.embed(inputs, start), lambda: stored)
        logits, _ = _follow(
            lambda: None, lambda _: ends.logits(x_BTD, inputs), lambda: [*stored, x_BTD]
        )
    return replace(embed, held_bytes=storage_bytes(stored)), logits, x_BTD.shape


@functools.cache
def block_memory(
    spec: MixerSpec | FFNSpec,
    workload: Workload,
    shape: torch.Size,
    provider: MixerSpec | None = None,
) -> BlockMemory:
    """Return what a sub-block takes.

    Args:
        spec: of the sub-block.
        workload: what is run.
        shape: of the input (B, T, D), the class token included.
        provider: the layer whose keys and values are there before, for mixers that share them.
    """
    with torch.inference_mode(False), torch.no_grad(), DryRun() as dry:
        block = _Running(spec, workload, dry)
        before = None if provider is None else _Running(provider, workload, dry)
        x_BTD = dry.hollow_out(torch.empty(shape))

        def keys_and_values() -> SharedKV:
            shared = SharedKV()
            if before is not None:
                before(dry.hollow_out(torch.empty(shape)), shared)
            return shared

        def restart() -> list[Tensor]:
            running = [block] if before is None else [before, block]
            for one in running:
                one.restart()
            return [x_BTD, *(tensor for one in running for tensor in one.held())]

        found, shared = _follow(keys_and_values, lambda shared: block(x_BTD, shared), restart)
        carried = [t for t in (shared.k_BGSK, shared.v_BGSK) if t is not None]
        held = block.held()
    held_bytes = storage_bytes(held)
    carried_bytes = storage_bytes([*carried, *held]) - held_bytes
    return replace(found, held_bytes=held_bytes, carried_bytes=carried_bytes)


class _Running:
    """A sub-block without values, with its state."""

    def __init__(self, spec: MixerSpec | FFNSpec, workload: Workload, dry: DryRun) -> None:
        self._block, self._workload = _hollow_block(spec), workload
        for tensor in self._stored():
            dry.hollow_out(tensor)
        self._has_state = workload.phase == "decode" and not _borrows(spec)
        self._state: Any = None
        self.restart()

    def restart(self) -> None:
        """Start from a new state."""
        if self._has_state:
            self._state = self._block.init_state(self._workload.batch, self._workload.max_tokens)

    def _stored(self) -> list[Tensor]:
        return [*self._block.parameters(), *self._block.buffers()]

    def held(self) -> list[Tensor]:
        """Return what is there all the time; states have the form that a step leaves.

        A state may keep more than its `tensors`, which can be made anew: filters, for one.
        """
        state = [] if self._state is None else tensors_in(vars(self._state))
        kept = [*kept_tensors(self._block), *state]
        return [*self._stored(), *kept]

    def __call__(self, x_BTD: Tensor, shared: SharedKV) -> Tensor:
        """Run once, a decode step always from the same position."""
        if self._state is not None:
            self._state.length = self._workload.tokens
        args = (shared,) if hasattr(self._block.op, "shares_kv") else ()
        out_BTD: Tensor = self._block(x_BTD, self._state, *args)
        return out_BTD


def _follow(
    prepare: Callable[[], G], call: Callable[[G], object], restart: Callable[[], Iterable[Tensor]]
) -> tuple[BlockMemory, G]:
    """Run `call(prepare())` until nothing new is kept; returns what it took and was prepared.

    Args:
        prepare: makes what `call` may free.
        call: what is to be followed.
        restart: called once before it starts anew; returns what is there and not counted.
    """
    call(prepare())
    with TensorMemory() as memory:
        for tensor in restart():
            memory.track(tensor)
        call(prepare())
        prepared = prepare()
        memory.restart_peak()
        before_bytes = memory.live_bytes
        call(prepared)
    pass_bytes = memory.peak_bytes - before_bytes
    return BlockMemory(0, pass_bytes, 0, tuple(memory.found)), prepared


def _borrows(spec: MixerSpec | FFNSpec) -> bool:
    return isinstance(spec, MixerSpec) and spec.kv_shared


def _hollow_block(spec: MixerSpec | FFNSpec | EndsSpec) -> Any:
    """Return a packed sub-block whose weights were never written."""
    with torch.device("meta"):
        block: nn.Module = build_sub_block(spec)
        pack(block)
    return block.to_empty(device="cpu").eval().requires_grad_(False)
