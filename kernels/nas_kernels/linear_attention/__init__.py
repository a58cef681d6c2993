"""Causal linear attention with an optional per-feature decay."""

from nas_kernels.linear_attention.chunked import linear_attention
from nas_kernels.linear_attention.ref import recurrent_linear_attention

__all__ = ["linear_attention", "recurrent_linear_attention"]
