"""Hugging Face folders that hold their own code."""

from nas.export.huggingface.exporter import HuggingFaceExporter

__all__ = ["HuggingFaceExporter"]
