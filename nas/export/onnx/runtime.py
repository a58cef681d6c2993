"""Exported graphs in use, by ONNX Runtime.

Shapes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hw_profiles.backends.onnx_runtime import open_session
from nas.export.base import Session

IO_FILE = "io.json"


class LoadedOnnx:
    """A folder with graphs and `io.json`.

    Args:
        folder: as `OnnxExporter` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / IO_FILE).read_text("utf-8"))
        self.sessions = {
            name: open_session(str(folder / graph["file"]))
            for name, graph in self.about["graphs"].items()
        }

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        session = self.sessions["prefill" if "prefill" in self.sessions else "whole"]
        name = session.get_inputs()[0].name
        (out,) = session.run(["logits"], {name: inputs.contiguous().numpy()})
        return torch.from_numpy(out)

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        return _Sequences(self)


class _Sequences:
    """Sequences in progress: their state stays in ONNX Runtime's memory."""

    def __init__(self, loaded: LoadedOnnx) -> None:
        self._prefill, self._decode = loaded.sessions["prefill"], loaded.sessions["decode"]
        self._names = [pair["output"] for pair in loaded.about["state"]]
        self._inputs = [pair["input"] for pair in loaded.about["state"]]
        self._state: dict[str, Any] = {}
        self._length = 0

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        if not self._length:
            return self._run(self._prefill, tokens_BT, {})
        parts = [
            self._run(self._decode, token_B1, {**self._state, "past_length": self._past()})
            for token_B1 in tokens_BT.split(1, dim=1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run(self, graph: Any, tokens_BT: Tensor, feeds: dict[str, Any]) -> Tensor:
        feeds = {"input_ids": _value(tokens_BT.contiguous().numpy()), **feeds}
        logits, *state = graph.run_with_ort_values(["logits", *self._names], feeds)
        self._state = dict(zip(self._inputs, state, strict=True))
        self._length += tokens_BT.shape[1]
        return torch.from_numpy(logits.numpy())

    def _past(self) -> Any:
        return _value(np.array(self._length, np.int64))


def _value(array: Any) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
