"""What an export format is, and what it is given.

Shapes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nas.tasks.input_forms import InputForm
from nas.tasks.tokenizers import Tokenizer
from searchspace.arch import Arch
from searchspace.subnet import Subnet

Session = Callable[[Tensor], Tensor]
"""Maps the next tokens (B, T) of B sequences to logits (B, T, V), and remembers them."""


@dataclass(frozen=True)
class Handover:
    """A network that is handed over.

    Args:
        subnet: packed, with the weights it is deployed with, on the CPU; not to be changed.
        task: JSON-ready facts: `unit`, `vocab_size`, `seq_len`; `classes` of a classifier.
        tokenizer: of a decoder of text.
        rewrites: names of those that were applied; see `searchspace.rewrites`.
        input_form: of a classifier: how a text or a picture becomes its input.
    """

    subnet: Subnet
    task: Mapping[str, Any]
    tokenizer: Tokenizer | None = None
    rewrites: tuple[str, ...] = ()
    input_form: InputForm | None = None

    @property
    def arch(self) -> Arch:
        """The network's arch."""
        return self.subnet.arch


class Loaded(Protocol):
    """An artefact in use, as its users would load it."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits (B, T, V) of a decoder, (B, V) of the others, in fp32.

        Args:
            inputs: token ids (B, T), int64, or images (B, C, H, W); any B, any T.
        """

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues `batch` sequences of a decoder, up to `max_tokens` tokens."""


class Exporter(Protocol):
    """A format: how a network is written, and how the result is loaded again to be verified.

    To add one: a class with these members in a file of this folder, and one line in `EXPORTERS`.
    """

    @property
    def name(self) -> str:
        """The name in `EXPORTERS`, `export.formats` and `export.json`."""

    @property
    def summary(self) -> str:
        """One line for help texts."""

    @property
    def folder(self) -> str:
        """Where in the subnetwork's folder its files lie; empty for the folder itself."""

    @property
    def max_difference(self) -> float:
        """Allowed difference of logits from the supernet's, relative to the largest one.

        Infinite for a format that rounds further: it is judged by its loss alone.
        """

    def missing(self) -> str:
        """Return which packages to install, if one is missing; else an empty text."""

    def refusal(self, handover: Handover) -> str:
        """Return why this network has no such form, as a sentence; else an empty text."""

    def stands_for(self, handover: Handover) -> Subnet:
        """Return the network, in PyTorch, whose loss the artefact must have."""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write the artefact into a folder, which is there.

        Returns:
            JSON-ready facts for `export.json`, such as the opset.

        Raises:
            ExportFailed: when it cannot be made.
        """

    def load(self, folder: Path) -> Loaded:
        """Return the artefact in use; called in a process that knows nothing of the writing."""


class WeightsAsStored:
    """A format that rounds nothing further."""

    def stands_for(self, handover: Handover) -> Subnet:
        """Return the network itself."""
        return handover.subnet


class ExportFailed(RuntimeError):
    """An artefact could not be made, or does not compute what the supernet computes."""
