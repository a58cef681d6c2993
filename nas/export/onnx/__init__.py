"""ONNX graphs of a network, with ONNX Runtime as what verifies and runs them."""

from nas.export.onnx.exporter import OnnxExporter, OnnxInt4Exporter, OnnxInt8Exporter

__all__ = ["OnnxExporter", "OnnxInt4Exporter", "OnnxInt8Exporter"]
