"""The selective state space recurrence of Mamba (S6)."""

from nas_kernels.selective_scan.chunked import selective_scan
from nas_kernels.selective_scan.ref import recurrent_selective_scan

__all__ = ["recurrent_selective_scan", "selective_scan"]
