"""Networks with weights rounded further, as ONNX Runtime has fast products for them.

Shapes: N output rows, K columns.
"""

from __future__ import annotations

import copy

from searchspace.linear import Linear
from searchspace.precisions import PRECISIONS
from searchspace.subnet import Subnet

FULL = ("fp32", "bf16")
"""Precisions that are rounded further."""
LEAST = 32
"""Maps with fewer columns or rows stay as they are: nothing would be saved."""


def rounded(subnet: Subnet, precision: str) -> Subnet:
    """Return a copy, on the same tensors, with the maps that are stored in full rounded.

    The others, and norms, convolutions and the like, stay as they are.
    """
    tensors = [*subnet.parameters(), *subnet.buffers()]
    # Told that these are copied already, `deepcopy` copies the structure only.
    copied = copy.deepcopy(subnet, {id(tensor): tensor for tensor in tensors})
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear) and child.precision in FULL:
                setattr(parent, name, _rounded(child, precision))
    return copied


def _rounded(linear: Linear, precision: str) -> Linear:
    rows, columns = linear.weight.shape
    if min(rows, columns) < LEAST:
        return linear
    made = Linear(0, 0, precision)
    del made.weight
    for name, tensor in PRECISIONS[precision].pack(linear.weight.detach().float()).items():
        made.register_buffer(name, tensor)
    made.bias = linear.bias
    return made.eval()
