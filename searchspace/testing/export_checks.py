"""The checks of `check_operator` about leaving PyTorch's eager mode.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

from searchspace.ffn import FFNS
from searchspace.mixers import MIXERS
from searchspace.specs import MixerSpec
from searchspace.testing.operator_checks import (
    D_MODEL,
    FP32_RMS,
    Spec,
    bound_of,
    make_block,
    make_input,
    require,
    require_close,
)

EXPORT_TOKENS = 19


def onnx_reason(spec: Spec) -> str:
    """Return why an operator says it cannot be exported to ONNX; empty where it can."""
    return MIXERS[spec.mixer].onnx if isinstance(spec, MixerSpec) else FFNS[spec.ffn].onnx


@torch.no_grad()
def check_export(spec: Spec) -> None:
    """`torch.export` captures the sub-block, and the captured graph computes the same."""
    block, x_BTD = make_block(spec), make_input(tokens=EXPORT_TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(block, (x_BTD,))
    require_close(program.module()(x_BTD), block(x_BTD), bound_of(spec), "torch.export")


class _Stateless(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.block(x_BTD)
        return out


@torch.no_grad()
def check_onnx(spec: Spec) -> None:
    """ONNX Runtime computes the same, or the operator says why it cannot be exported."""
    if onnx_reason(spec):
        return
    import onnxruntime

    block, x_BTD = make_block(spec), make_input(tokens=EXPORT_TOKENS)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(_Stateless(block), (x_BTD,), dynamo=True, verbose=False)
    assert program is not None
    graph = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph, options)
    inputs = session.get_inputs()
    require(len(inputs) == 1 and inputs[0].shape[-1] == D_MODEL, "the graph has other inputs")
    (out,) = session.run(None, {inputs[0].name: x_BTD.numpy()})
    bound = max(bound_of(spec), 10 * FP32_RMS)
    require_close(torch.from_numpy(out), block(x_BTD), bound, "ONNX Runtime")
