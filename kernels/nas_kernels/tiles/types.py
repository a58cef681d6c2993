"""Triton's names of types."""

from __future__ import annotations

from typing import Any

import torch

from nas_kernels.dispatch import interpreting


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return what operands of products are rounded to, which the interpreter can do in fp32 only.

    Args:
        dtype: bf16 and fp16 are multiplied as they are, all others in fp32.
    """
    import triton.language as tl

    halves = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if interpreting() else halves.get(dtype, tl.float32)
