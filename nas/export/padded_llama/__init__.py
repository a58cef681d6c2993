"""Plain Llama folders, padded with zeros."""

from nas.export.padded_llama.exporter import PaddedLlamaExporter

__all__ = ["PaddedLlamaExporter"]
