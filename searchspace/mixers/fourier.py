"""Fixed transforms over tokens and features: Fourier (FNet) and cosine.

Both are orthonormal, so that in a residual network with norms before the mixers the result keeps
the size of its input; FNet's own transform is sqrt(T D) times as large, which its norm behind the
residual sum takes out again.

Shapes: B batch, T tokens, D d_model, F frequencies.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from nas_kernels.constants import cached_constant
from searchspace.mixers.base import Mixer


class FixedTransform(Mixer):
    """Base of transforms without parameters; they need every token, so only encoders have them.

    Each output feature depends on all input features and on how many those are: a narrower
    network computes the transform of its own width.
    """

    directions: ClassVar = ("bidirectional",)
    heads: ClassVar = "none"
    ordered: ClassVar = True
    has_linears: ClassVar = False


class FourierMixer(FixedTransform):
    """The real part of the two-dimensional discrete Fourier transform over tokens and features.

    Source: Lee-Thorp et al. 2021, "FNet: Mixing Tokens with Fourier Transforms", equation 3. The
    fast transform was measured faster than the paper's products with DFT matrices at every length
    from 64 to 2048 tokens.
    """

    onnx: ClassVar = "its Fourier transform has complex numbers"

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Transform."""
        width = x_BTD.shape[2]
        real = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        left_BTF = torch.fft.fft(torch.fft.rfft(real, norm="ortho"), dim=1, norm="ortho").real
        # Real inputs: frequency (t, -d) has the same real part as (-t, d).
        mirrored = left_BTF[..., 1 : (width + 1) // 2].flip(-1)
        mirrored = torch.cat([mirrored[:, :1], mirrored[:, 1:].flip(1)], dim=1)
        return torch.cat([left_BTF, mirrored], dim=-1)


class CosineMixer(FixedTransform):
    """The two-dimensional discrete cosine transform (type 2) over tokens and features.

    Source: Ahmed, Natarajan and Rao 1974, "Discrete Cosine Transform", equation 1, in the place of
    FNet's Fourier transform (Lee-Thorp et al. 2021, appendix on other transforms).
    """

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Transform."""
        over_TT = dct_matrix(x_BTD.shape[1], x_BTD.dtype, x_BTD.device)
        over_DD = dct_matrix(x_BTD.shape[2], x_BTD.dtype, x_BTD.device)
        return over_TT @ (x_BTD @ over_DD.t())


@cached_constant
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal cosine transform of type 2, (F, T)."""
    frequency_F1 = torch.arange(size, dtype=torch.float64, device=device)[:, None]
    time_T = torch.arange(size, dtype=torch.float64, device=device)[None, :]
    # As a tensor: in a graph for any number of tokens it is not known yet.
    size_1 = torch.full((1,), torch.sym_float(size), dtype=torch.float64, device=device)
    matrix_FT = torch.cos(math.pi / size_1 * (time_T + 0.5) * frequency_F1)
    scale_F1 = torch.where(frequency_F1 == 0, 1 / size_1, 2 / size_1).sqrt()
    return (matrix_FT * scale_F1).to(dtype)
