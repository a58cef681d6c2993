"""Feed-forward networks. To add one: a class in a file here, and a line in `FFNS`."""

from searchspace.ffn.glu import GeGLU, ReGLU, SwiGLU
from searchspace.ffn.mlp import FFN, GeluMLP, ReluMLP, SiluMLP, SquaredReluMLP
from searchspace.ffn.polynomial import PolyNormMLP, PolyReluMLP
from searchspace.ffn.rwkv_channelmix import RWKVChannelMix
from searchspace.ffn.stack import GeluStack

FFNS: dict[str, type[FFN]] = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "reglu": ReGLU,
    "relu": ReluMLP,
    "relu2": SquaredReluMLP,
    "gelu": GeluMLP,
    "silu": SiluMLP,
    "polyrelu": PolyReluMLP,
    "polynorm": PolyNormMLP,
    "rwkv_channelmix": RWKVChannelMix,
    "gelu_stack": GeluStack,
}
"""Every FFN by name."""

__all__ = ["FFN", "FFNS"]
