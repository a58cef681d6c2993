"""ONNX: graphs for any batch and length that ONNX Runtime and others run.

A decoder has two, one that reads a prompt and one that goes on from its state by one token; other
networks have one. They are recorded by the profiler's own recorder, not `torch.onnx.export`: that
is an order of magnitude faster, and its translations are the ones whose latencies were measured.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.export.base import ExportFailed, Handover, Loaded
from searchspace.ffn import FFNS
from searchspace.files import write_json
from searchspace.mixers import MIXERS
from searchspace.specs import MixerSpec
from searchspace.subnet import Subnet


class OnnxExporter:
    """Weights as they are stored: fp32, or what the arch says."""

    name = "onnx"
    summary = "ONNX graphs for any batch and length, weights as they are"
    folder = "onnx"
    max_difference = 1e-4
    precision = ""

    def missing(self) -> str:
        """Return which packages to install, if one is missing."""
        missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
        return f"install {' and '.join(missing)} (pip install 'hwnas[export]')" if missing else ""

    def refusal(self, handover: Handover) -> str:
        """Return which operator has no form in ONNX; see `Exporter.refusal`."""
        for _, spec in handover.arch.named_sub_blocks():
            name = spec.mixer if isinstance(spec, MixerSpec) else spec.ffn
            operator = MIXERS[name] if isinstance(spec, MixerSpec) else FFNS[name]
            if operator.onnx:
                return f"{name} has no form in ONNX: {operator.onnx}"
        return ""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write the graphs, the weights and `io.json`; see `Exporter.write`."""
        from hw_profiles.backends.onnx_runtime.builder import OPSET
        from nas.export.onnx.files import WEIGHTS, write_graphs
        from nas.export.onnx.graphs import graphs_of
        from nas.export.onnx.runtime import IO_FILE

        began = time.perf_counter()
        try:
            graphs = graphs_of(self.stands_for(handover), bool(self.precision))
        except NotImplementedError as error:
            raise ExportFailed(f"{handover.arch.id} has no ONNX form: {error}") from error
        nodes = write_graphs({f"{name}.onnx": graph for name, graph in graphs.items()}, folder)
        write_json(folder / IO_FILE, description(graphs, WEIGHTS))
        return {"opset": OPSET, "nodes": nodes, "export_s": round(time.perf_counter() - began, 2)}

    def stands_for(self, handover: Handover) -> Subnet:
        """Return the network with the weights that are written."""
        if not self.precision:
            return handover.subnet
        from nas.export.onnx.rounding import rounded

        return rounded(handover.subnet, self.precision)

    def load(self, folder: Path) -> Loaded:
        """Return the graphs in use; see `Exporter.load`."""
        from nas.export.onnx.runtime import LoadedOnnx

        return LoadedOnnx(folder)


class OnnxInt8Exporter(OnnxExporter):
    """Weights in int8, a scale per row; activations in int8, a scale per token."""

    name = "onnx-int8"
    summary = "ONNX graphs with int8 weights and activations (MatMulInteger)"
    folder = "onnx-int8"
    max_difference = float("inf")
    precision = "int8"


class OnnxInt4Exporter(OnnxExporter):
    """Weights in int4, a scale and zero point per row and group of 32."""

    name = "onnx-int4"
    summary = "ONNX graphs with int4 weights (MatMulNBits)"
    folder = "onnx-int4"
    max_difference = float("inf")
    precision = "int4"


def description(graphs: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Return the content of `io.json`: what goes into the graphs and what comes out."""
    about: dict[str, Any] = {
        "graphs": {
            name: {"file": f"{name}.onnx", "inputs": graph.inputs, "outputs": graph.outputs}
            for name, graph in graphs.items()
        },
        "weights": f"{weights} is read by every graph; keep it beside them.",
    }
    if "decode" in graphs:
        names = [name for name in graphs["decode"].inputs if name.startswith("past.")]
        about["state"] = [
            {"input": name, "output": name.replace("past.", "present.", 1)} for name in names
        ]
        about["use"] = (
            "Run prefill on a prompt of at least one token, then decode on one token at a time. "
            "Hand every output of 'state' back as the input beside it; past_length is the number "
            "of tokens so far, without the new one. Free sizes have names: batch, tokens, past."
        )
    return about
