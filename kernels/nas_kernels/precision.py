"""Where autocast would round too much."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which operations on the device of `x` keep their inputs' dtype."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return in what matrices are multiplied: autocast's dtype where it is on, else the wider."""
    dtype, device = torch.promote_types(x.dtype, weight.dtype), x.device.type
    if dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
