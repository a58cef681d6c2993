"""Feed-forward networks. To add one: a class in a file here, and a line in `FFNS`."""

from searchspace.ffn.mlp import FFN, GeluMLP, SquaredReluMLP
from searchspace.ffn.swiglu import SwiGLU

FFNS: dict[str, type[FFN]] = {"swiglu": SwiGLU, "relu2": SquaredReluMLP, "gelu": GeluMLP}
"""Every FFN by name."""

__all__ = ["FFN", "FFNS"]
