"""How results of kernels are compared: root mean square ratio to float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested: on a GPU, or in the interpreter."""
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""RMS ratio that an output of this dtype may differ by from float64 on the same inputs.

Triton's interpreter cuts off bits where a GPU rounds: one number may be off by 2^-7 in bf16.
"""


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of `expected`.

    Of zeros and of empty tensors it is that of the difference alone: 0 where they agree. NaN in
    `actual` gives NaN, which fails every comparison with a bound.
    """
    difference, right = (actual.double() - expected.double()), expected.double()
    if difference.numel() == 0:
        return 0.0
    size = right.square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / (size or 1.0)


def assert_close(actual: Tensor, expected: Tensor, bound: float | None = None) -> None:
    """Compare shape and values; the bound is that of `actual`'s dtype unless given."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    bound = TOLERANCE[actual.dtype] if bound is None else bound
    ratio = rms_ratio(actual, expected)
    assert ratio <= bound, f"RMS ratio {ratio:.2e} is above {bound:.0e}"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, on `DEVICE`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def misaligned(tensor: Tensor) -> Tensor:
    """Return the same values in memory that starts one element after an allocation."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    out = flat[1:].view(tensor.shape)
    out.copy_(tensor)
    return out


def in_wider_rows(tensor: Tensor, extra: int = 3) -> Tensor:
    """Return the same values as the leading columns of rows that go on with NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + extra), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def far_apart(rows_RD: Tensor) -> Tensor:
    """Return the same values in fp16, in rows further apart than 32 bits count elements."""
    num_rows, width = rows_RD.shape
    stride = 2**31 + 5
    size = (num_rows - 1) * stride + width
    if DEVICE.type == "cuda":
        memory = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:
        # Pages that nothing touches take no memory.
        memory = torch.from_numpy(np.zeros(size, dtype=np.float16))
    return memory.as_strided((num_rows, width), (stride, 1)).copy_(rows_RD)
