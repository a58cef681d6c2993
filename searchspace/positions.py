"""Position information of attention: rotary embeddings, linear biases, or none.

How encodings are named is said in `searchspace.position_names`.

Shapes: B batch, H heads, T tokens, S keys, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas_kernels.constants import cached_constant
from searchspace.position_names import KINDS, parse_rope, position_kind

__all__ = ["KINDS", "alibi_bias", "apply_rope", "parse_rope", "position_kind"]


@cached_constant
def _rope_table(width: int, base: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _rotations(width, base, torch.arange(length, device=device))


def _rotations(width: int, base: int, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (T, K) for positions."""
    inverse_K = base ** (-torch.arange(0, width, 2, device=position_T.device) / width)
    angle_TK = position_T[:, None] * inverse_K.repeat(2)
    # The sign of rotate-half is folded into the sines: it saves a negation per call.
    sign_K = torch.ones_like(inverse_K).repeat(2)
    sign_K[: width // 2].fill_(-1.0)
    return angle_TK.cos(), angle_TK.sin() * sign_K


def apply_rope(x_BHTK: Tensor, start: int, name: str = "rope") -> Tensor:
    """Rotate `x_BHTK`, whose first token stands at position `start`.

    Source: Su et al. 2021, "RoFormer", equation 34, in the half-split form of GPT-NeoX, whose
    partial rotation is the one of Black et al. 2022, section 2.1.
    """
    rope = parse_rope(name)
    width = rope.rotated(x_BHTK.shape[-1])
    if width < x_BHTK.shape[-1]:
        rotated = _rotate(x_BHTK[..., :width], start, rope.base)
        return torch.cat([rotated, x_BHTK[..., width:]], dim=-1)
    return _rotate(x_BHTK, start, rope.base)


def _rotate(x_BHTK: Tensor, start: int, base: int) -> Tensor:
    tokens, width, device = x_BHTK.shape[-2], x_BHTK.shape[-1], x_BHTK.device
    end = start + tokens
    if isinstance(end, torch.SymInt):
        # A graph for any number of tokens: no table would be long enough.
        cos, sin = _rotations(width, base, torch.arange(start, end, device=device))
    else:
        # Tables grow in powers of two, so decoding does not build one for every length.
        cos, sin = _rope_table(width, base, 1 << max(end - 1, 63).bit_length(), device)
        cos, sin = cos[start:end], sin[start:end]
    rolled = torch.roll(x_BHTK, width // 2, dims=-1)
    return torch.addcmul(x_BHTK * cos.to(x_BHTK.dtype), rolled, sin.to(x_BHTK.dtype))


@cached_constant
def alibi_bias(
    num_heads: int, num_queries: int, num_keys: int, start: int, device: torch.device
) -> Tensor:
    """Return what is added to attention scores, (H, T, S): minus slope times distance.

    The distance is symmetric, so the same bias serves both directions; a causal mask is not part
    of it. Query t stands at position `start + t`. Heads keep their slope when later heads are left
    out only if the number of heads does not change it, so slopes are those of 2^(-8h/H).

    Source: Press, Smith and Lewis 2022, "Train Short, Test Long", section 3; Portes et al. 2023,
    "MosaicBERT", section 2.1 (symmetric form).
    """
    slope_H = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=device) / num_heads)
    query_T1 = torch.arange(start, start + num_queries, device=device)[:, None]
    distance_TS = (query_T1 - torch.arange(num_keys, device=device)[None, :]).abs()
    return -slope_H[:, None, None] * distance_TS
