"""RWKV's weighted mean of values with exponentially decaying weights."""

from nas_kernels.wkv.chunked import WKVState, bidirectional_wkv, wkv
from nas_kernels.wkv.ref import recurrent_wkv

__all__ = ["WKVState", "bidirectional_wkv", "recurrent_wkv", "wkv"]
