"""Which floating-point precision training is fastest in on this machine."""

from __future__ import annotations

import time

import torch

from nas.training.device import CPU

BF16_CHIP = (8, 0)
"""Compute capability from which tensor cores multiply bf16."""


def faster_precision(device: torch.device = CPU, dim: int = 512, repeats: int = 5) -> str:
    """Return ``"bf16"`` where bf16 matrix products are at least 1.5 times as fast, else fp32.

    On a GPU this is not measured: it follows from the chip.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= BF16_CHIP else "fp32"

    def fastest(dtype: torch.dtype) -> float:
        x = torch.randn(2048, dim).to(dtype)
        w = torch.randn(dim, dim).to(dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        return min(times)

    return "bf16" if fastest(torch.float32) > 1.5 * fastest(torch.bfloat16) else "fp32"
