"""Handing subnetworks over: folders that load on their own, and the proof that they are the same.

`EXPORTERS` holds the formats; adding one is described at `nas.export.base.Exporter`.
"""

from __future__ import annotations

from nas.export.base import Exporter, ExportFailed, Handover
from nas.export.executorch import ExecuTorchExporter
from nas.export.huggingface import HuggingFaceExporter
from nas.export.onnx import OnnxExporter, OnnxInt4Exporter, OnnxInt8Exporter
from nas.export.padded_llama import PaddedLlamaExporter
from nas.export.pt2 import ProgramExporter
from nas.export.torchao import TorchAoExporter

__all__ = ["EXPORTERS", "ExportFailed", "Exporter", "Handover"]

EXPORTERS: dict[str, type[Exporter]] = {
    "hf": HuggingFaceExporter,
    "padded": PaddedLlamaExporter,
    "onnx": OnnxExporter,
    "onnx-int8": OnnxInt8Exporter,
    "onnx-int4": OnnxInt4Exporter,
    "pt2": ProgramExporter,
    "pte": ExecuTorchExporter,
    "torchao": TorchAoExporter,
}
