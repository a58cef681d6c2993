"""The ``pte`` format: a program for ExecuTorch, PyTorch's runtime for small devices.

Shapes: B batch, T tokens, P tokens before, V vocabulary or classes.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from nas.export.base import ExportFailed, Handover, Session, WeightsAsStored
from nas.export.pt2.programs import (
    Bounds,
    decode_program,
    prefill_program,
    recording,
    whole_program,
)
from nas.export.quiet import quiet
from searchspace.files import write_file
from searchspace.linear import Linear
from searchspace.specs import MixerSpec
from searchspace.untrusted import file_inside

PROGRAM = "model.pte"
WHOLE, PREFILL, DECODE = "forward", "prefill", "decode"
MORE_TOKENS = 64
"""Tokens beyond the task's sequences that memory is planned for."""
BOTH = frozenset(
    {
        "softmax", "sliding_window", "strided", "fixed", "relu_attention", "norm_attention",
        "linear_elu", "hedgehog", "cosine", "norm_linear", "flow",
    }
)  # fmt: skip
LOWERED = {
    True: BOTH,
    False: BOTH
    | {"linformer", "latte", "slab", "galerkin", "fourier_sf", "gla", "retention", "pool"},
}
"""Mixers that were seen to run in ExecuTorch at any length, causal and not; of the others some
have an operator that it lacks, and some a loop or a size that it does not lower."""


class ExecuTorchExporter(WeightsAsStored):
    """One file for sequences one at a time: `forward`, or `prefill` and `decode` of a decoder.

    Weights are shared by both. XNNPACK computes some functions by approximations of its own.
    """

    name = "pte"
    summary = "a program for ExecuTorch with XNNPACK"
    folder = "pte"
    max_difference = 1e-4

    def missing(self) -> str:
        """Return how to get ExecuTorch, if it is not installed."""
        if importlib.util.find_spec("executorch"):
            return ""
        return "executorch is not installed; pip install executorch"

    def refusal(self, handover: Handover) -> str:
        """Return which layer has no form in ExecuTorch."""
        for name, spec in handover.arch.named_sub_blocks():
            if isinstance(spec, MixerSpec) and spec.mixer not in LOWERED[spec.causal]:
                return (
                    f"layer {name} is {spec.mixer!r}, which ExecuTorch does not run at any length"
                )
        for module in handover.subnet.modules():
            if isinstance(module, Linear) and module.packed:
                return (
                    f"it has {module.precision} maps, which XNNPACK would store and round in "
                    "another form; choose an fp32 network"
                )
        return ""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write the program; see `Exporter.write`."""
        with quiet():
            import executorch.version as version

            most = int(handover.task["seq_len"]) + MORE_TOKENS
            bounds = Bounds(1, most)
            subnet = handover.subnet
            try:
                if handover.arch.family.causal:
                    prefill = prefill_program(subnet, bounds)
                    decode = decode_program(subnet, bounds, as_axis=True).program
                    content, backend = _lowered({PREFILL: prefill, DECODE: decode})
                else:
                    content, backend = _lowered({WHOLE: whole_program(subnet, bounds)})
            except (RuntimeError, ValueError) as error:
                raise ExportFailed(f"ExecuTorch cannot lower it: {error}") from error
        write_file(folder / PROGRAM, lambda stream: stream.write(content))
        return {
            "executorch_version": version.__version__,
            "backend": backend,
            "batch": 1,
            "most_tokens": most,
        }

    def load(self, folder: Path) -> LoadedMethods:
        """Return the program in ExecuTorch's Python runtime; see `Exporter.load`."""
        path = file_inside(folder, PROGRAM, "ExecuTorch program")
        with quiet():
            from executorch.runtime import Runtime

            return LoadedMethods(Runtime.get().load_program(path))


class LoadedMethods:
    """A program in the runtime; it takes one sequence at a time.

    Args:
        program: of `executorch.runtime`.
    """

    def __init__(self, program: Any) -> None:
        # A method keeps memory of its own, so every one is loaded once.
        self.methods = {name: program.load_method(name) for name in program.method_names}

    def run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return a method's results; they are copied out of its memory."""
        given = [tensor.contiguous() for tensor in inputs]
        return [tensor.clone() for tensor in self.methods[name].execute(given)]

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        name = PREFILL if PREFILL in self.methods else WHOLE
        return torch.cat([self.run(name, [row])[0] for row in inputs.split(1)])

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        return _Session(self, batch)


class _Session:
    """Goes on from the state of every sequence."""

    def __init__(self, program: LoadedMethods, batch: int) -> None:
        self.program = program
        self.states: list[list[Tensor]] = [[] for _ in range(batch)]
        self.length = 0

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the next tokens."""
        if self.length == 0:
            return self._next(PREFILL, tokens_BT)
        return torch.cat([self._next(DECODE, token) for token in tokens_BT.split(1, dim=1)], dim=1)

    def _next(self, method: str, tokens_BT: Tensor) -> Tensor:
        before = [torch.zeros(self.length, dtype=torch.int64)] if method == DECODE else []
        rows = []
        for index, row in enumerate(tokens_BT.split(1)):
            logits, *state = self.program.run(method, [row, *before, *self.states[index]])
            self.states[index] = state
            rows.append(logits)
        self.length += tokens_BT.shape[1]
        return torch.cat(rows)


def _lowered(programs: Mapping[str, ExportedProgram]) -> tuple[bytes, str]:
    """Return a file's content, and what computes it: XNNPACK, or ExecuTorch's own operators."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # The check of its own dialect knows no free sizes in some operators that run with them.
    config = EdgeCompileConfig(_check_ir_validity=False)

    def lower(partitioners: list[Any]) -> bytes:
        given = {name: copy.copy(program) for name, program in programs.items()}
        lowered = to_edge_transform_and_lower(
            given, partitioner=partitioners, compile_config=config
        )
        return bytes(lowered.to_executorch().buffer)

    with recording():
        try:
            return lower([XnnpackPartitioner()]), "xnnpack"
        except (RuntimeError, ValueError):
            # Some free sizes and some results that are inputs are too much for it.
            return lower([]), "portable"
