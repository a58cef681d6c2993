"""Linear attention, causal with an optional decay, or bidirectional."""

from nas_kernels.linear_attention.chunked import full_linear_attention, linear_attention
from nas_kernels.linear_attention.latent import latent_attention
from nas_kernels.linear_attention.ref import recurrent_linear_attention

__all__ = [
    "full_linear_attention",
    "latent_attention",
    "linear_attention",
    "recurrent_linear_attention",
]
