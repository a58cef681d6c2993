"""The ``pt2`` format: programs that `torch.export.load` reads, without any code of ours.

Shapes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.export.base import ExportFailed, Handover, Session, WeightsAsStored
from nas.export.pt2.archive import load_program, save_program, without_weights
from nas.export.pt2.programs import decode_program, prefill_program, whole_program
from nas.export.quiet import quiet
from searchspace.errors import UserError
from searchspace.files import write_json
from searchspace.specs import MixerSpec
from searchspace.untrusted import read_small_json

PROGRAM, PREFILL, DECODE = "model.pt2", "prefill.pt2", "decode.pt2"
FACTS = "programs.json"


class ProgramExporter(WeightsAsStored):
    """One program of an encoder or ViT; of a decoder one for prompts and one for further tokens.

    The weights lie in the one for prompts; the other one gets them when it is loaded, as in

        prefill, decode = (torch.export.load(name) for name in ("prefill.pt2", "decode.pt2"))
        decode.state_dict.update(prefill.state_dict)

    A module of a program checks every input unless its `validate_inputs` is set to false, which in
    a small network takes as long as computing the next token.

    Load only files that you trust with `torch.export.load`; see `nas.export.pt2.archive`.
    """

    name = "pt2"
    summary = "programs of torch.export, for PyTorch without any code of ours"
    folder = "pt2"
    max_difference = 1e-5

    def missing(self) -> str:
        """Return an empty text: PyTorch is all it needs."""
        return ""

    def refusal(self, handover: Handover) -> str:
        """Return which operator cannot be recorded for any number of tokens."""
        for name, spec in handover.arch.named_sub_blocks():
            if isinstance(spec, MixerSpec) and (reason := _unrecorded(spec)):
                return f"layer {name} is {spec.mixer!r}, {reason}"
        return ""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write the programs; see `Exporter.write`."""
        facts: dict[str, Any] = {"torch_version": torch.__version__}
        with quiet():
            try:
                if handover.arch.family.causal:
                    decode = decode_program(handover.subnet)
                    prefill = prefill_program(handover.subnet)
                    save_program(prefill, folder / PREFILL)
                    without_weights(decode.program, prefill)
                    save_program(decode.program, folder / DECODE)
                    facts |= {"programs": [PREFILL, DECODE], "state": decode.state}
                    facts |= {"weights": PREFILL}
                else:
                    save_program(whole_program(handover.subnet), folder / PROGRAM)
                    facts |= {"programs": [PROGRAM]}
            except (RuntimeError, NotImplementedError) as error:
                raise ExportFailed(f"torch.export cannot record it: {error}") from error
        write_json(folder / FACTS, facts)
        return facts

    def load(self, folder: Path) -> LoadedProgram:
        """Return the programs in use; see `Exporter.load`."""
        facts = read_small_json(folder, FACTS, "list of programs")
        names = facts.get("programs") if isinstance(facts, dict) else None
        if names not in ([PROGRAM], [PREFILL, DECODE]):
            raise UserError(f"{folder / FACTS} names no programs of ours; export it again")
        with quiet():
            programs = [load_program(folder, name) for name in names]
            if facts.get("weights") == PREFILL:
                programs[-1].state_dict.update(programs[0].state_dict)
            modules: list[Any] = [program.module() for program in programs]
        for module in modules:
            module.validate_inputs = False
        return LoadedProgram(*modules)


def _unrecorded(spec: MixerSpec) -> str:
    """Return why a mixer has no program for any number of tokens; empty where it has one."""
    if spec.mixer == "hyena" and spec.causal:
        return "whose filters are made for a number of tokens that is known beforehand"
    return ""


class LoadedProgram:
    """Programs of a network.

    Args:
        whole: maps inputs to logits; of a decoder to logits and state.
        decode: of a decoder: takes a token, the number of tokens before it and the state.
    """

    def __init__(self, whole: torch.nn.Module, decode: torch.nn.Module | None = None) -> None:
        self.whole = whole
        self.decode = decode

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        out = self.whole(inputs)
        logits: Tensor = out if self.decode is None else out[0]
        return logits

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        assert self.decode is not None
        return _Session(self.whole, self.decode)


class _Session:
    """Goes on from the state of the tokens so far."""

    def __init__(self, prefill: torch.nn.Module, decode: torch.nn.Module) -> None:
        self.prefill = prefill
        self.decode = decode
        self.state: list[Tensor] = []
        self.length = 0

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the next tokens."""
        if self.length == 0:
            logits, *self.state = self.prefill(tokens_BT)
            self.length = tokens_BT.shape[1]
            found: Tensor = logits
            return found
        parts = []
        for token_B1 in tokens_BT.split(1, dim=1):
            logits, *self.state = self.decode(token_B1, self.length, *self.state)
            self.length += 1
            parts.append(logits)
        return torch.cat(parts, dim=1)
