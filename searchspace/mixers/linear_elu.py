"""Linear attention with the feature map elu(x) + 1."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from searchspace.mixers.recurrent import QuotientMixer, QuotientState


class LinearAttention(QuotientMixer):
    """`phi(q)^T sum phi(k) v^T / phi(q)^T sum phi(k)` with `phi(x) = elu(x) + 1`.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equations 7, 9 and 16-20.
    """

    def forward(self, x_BTD: Tensor, state: QuotientState | None = None) -> Tensor:
        """Attend to every token up to and including the own one; bidirectional: to every token."""
        q, k, v = self.project_qkv(x_BTD, state)
        out = self.quotient(elu_features(q), elu_features(k), v, state)
        return self.o_proj(self.merge_heads(out))


def elu_features(x: Tensor) -> Tensor:
    """Return `elu(x) + 1`, which is positive."""
    return F.elu(x) + 1.0
