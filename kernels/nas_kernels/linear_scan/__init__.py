"""First-order linear recurrences: `h_t = a_t h_{t-1} + b_t`, channel by channel."""

from nas_kernels.linear_scan.chunked import linear_scan
from nas_kernels.linear_scan.ref import recurrent_linear_scan

__all__ = ["linear_scan", "recurrent_linear_scan"]
