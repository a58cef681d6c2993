"""Linear attention with the feature map elu(x) + 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.mixers.recurrent import RecurrentMixer, RecurrentState


class LinearAttention(RecurrentMixer):
    """`phi(q)^T sum phi(k) v^T / phi(q)^T sum phi(k)` with `phi(x) = elu(x) + 1`.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equations 7, 9 and 16-20.
    """

    @property
    def value_width(self) -> int:
        """One column more than the head: a column of ones sums up to the denominator."""
        return self.spec.head_dim + 1

    def forward(self, x_BTD: Tensor, state: RecurrentState | None = None) -> Tensor:
        """Attend to every token up to and including the own one."""
        q, k, v = self.project_qkv(x_BTD)
        # A scale on q cancels in the quotient; on k it keeps early sums in a moderate range.
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        out = self.run(q, k, v, None, state)
        out = out[..., :-1] / out[..., -1:].clamp_min(1e-6)
        return self.o_proj(self.merge_heads(out))
