"""Handing subnetworks over: folders that load on their own, and the proof that they are the same.

`EXPORTERS` holds the formats; adding one is described at `nas.export.base.Exporter`.
"""

from __future__ import annotations

from nas.export.base import Exporter, ExportFailed, Handover
from nas.export.huggingface import HuggingFaceExporter

__all__ = ["DEFAULT_FORMATS", "EXPORTERS", "ExportFailed", "Exporter", "Handover"]

EXPORTERS: dict[str, type[Exporter]] = {
    "hf": HuggingFaceExporter,
}
DEFAULT_FORMATS = ("hf",)
