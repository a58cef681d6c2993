"""Linear attention with the delta rule.

Shapes: B batch, T tokens, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kernels.delta_rule import delta_rule
from nas_kernels.precision import at_least_fp32
from searchspace.linear import Linear, project
from searchspace.mixers.base import ATTENTION_AXES
from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState, mean_of_directions
from searchspace.specs import MixerSpec


class DeltaNet(RecurrentMixer):
    """`S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`: a value replaces what its key held.

    Queries and keys are `silu`ed and of length 1, values `silu`ed, `beta = sigmoid(W_b x)` per
    key/value head; the output is normalised per head. Convolutions of 4 taps behind the projections
    are the paper's default (`qkv_dconv`). The bidirectional form normalises the mean of both
    directions.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length", sections 2.2 and 3.3; Schlag et al. 2021, "Linear Transformers Are Secretly Fast
    Weight Programmers", section 4.2.
    """

    ordered: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]] = {"qkv_dconv": 4}
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **ATTENTION_AXES,
        "deltanet_beta.weight": ("num_kv_heads", "d_model"),
        "head_norm": ("head_dim",),
    }

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        # As many rows as heads: other precisions would save nothing.
        self.deltanet_beta = Linear(spec.d_model, spec.num_kv_heads, "fp32")
        self.head_norm = nn.Parameter(torch.empty(spec.head_dim))

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter."""
        super().reset(generator, depth)
        with torch.no_grad():
            self.head_norm.fill_(1.0)

    def input_linears(self) -> list[Linear]:
        """Return every map of the input."""
        return [self.q_proj, self.k_proj, self.v_proj, self.deltanet_beta]

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Mix every token up to and including the own one; bidirectional: both directions."""
        q, k, v = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (F.silu(x) for x in self.convolve_qkv(q, k, v, state))
        beta_BGT = self.deltanet_beta(x_BTD).sigmoid().transpose(1, 2)
        inputs = unit_length(self.split_heads(q)), unit_length(self.split_heads(k))
        if not self.causal:
            out = mean_of_directions(
                lambda *args: delta_rule(*args)[0], *inputs, self.split_heads(v), beta_BGT
            )
        else:
            before = None if state is None else state.sum_BGKV
            out, after = delta_rule(*inputs, self.split_heads(v), beta_BGT, before)
            if state is not None:
                state.sum_BGKV = after
                state.length += x_BTD.shape[1]
        out = F.rms_norm(out.to(self.head_norm.dtype), self.head_norm.shape, self.head_norm, 1e-5)
        return self.o_proj(self.merge_heads(out))


def unit_length(x: Tensor) -> Tensor:
    """Scale the last axis to length 1, in fp32 or wider; tiny vectors stay tiny."""
    x = at_least_fp32(x)
    # The epsilon is inside the root: the gradient at zero is finite.
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)
