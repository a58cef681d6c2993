"""Two-matrix feed-forward networks.

Shapes: B batch, T tokens, D d_model, F hidden units.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from searchspace.linear import Linear, fusable, fused_linear
from searchspace.operator import Operator
from searchspace.specs import FFNSpec


class FFN(Operator):
    """`down_proj(activation(up_proj(x)))`, built at its final size.

    Widths are nested: a smaller network uses the leading rows of `up_proj` and the leading
    columns of `down_proj`. With the option `bias` ``"all"`` every map has one.

    Source: Vaswani et al. 2017, equation 2; Devvrit et al. 2023, "MatFormer", section 3.1.
    """

    spec: FFNSpec

    stateful: ClassVar[bool] = False
    """Whether a token's result depends on earlier tokens; then `forward` takes a state."""
    fused: ClassVar[str] = ""
    """What `nas_kernels.elastic_linear` calls the activation; empty where it has none such."""
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "up_proj.weight": ("intermediate_size", "d_model"),
        "down_proj.weight": ("d_model", "intermediate_size"),
    }
    options: ClassVar[dict[str, Any]] = {"bias": "none"}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"bias": ("none", "all")}

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__()
        self.spec = spec
        self.up_proj = self.linear(spec.d_model, spec.intermediate_size)
        self.down_proj = self.linear(spec.intermediate_size, spec.d_model)

    def linear(self, in_features: int, out_features: int) -> Linear:
        """Return a map in the spec's precision, with a bias where the option says so."""
        biased = self.option("bias") == "all"
        return Linear(in_features, out_features, self.spec.precision, biased)

    @classmethod
    def param_axes(cls, spec: Any) -> dict[str, tuple[str, ...]]:
        """Return the axes, those of biases only where they are there."""
        return cls.with_biases(spec, cls.axes)

    @classmethod
    def with_biases(
        cls, spec: FFNSpec, axes: dict[str, tuple[str, ...]]
    ) -> dict[str, tuple[str, ...]]:
        """Return the axes of weights together with those of their biases, where there are any."""
        if cls.option_of(spec, "bias") == "none":
            return axes
        weights = [name for name in axes if name.endswith(".weight")]
        return {**axes, **{f"{name[:-6]}bias": axes[name][:1] for name in weights}}

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return the nonlinearity of the hidden units, same shape."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Map each token on its own, same shape; only a `stateful` one uses a state."""
        if self.fused and fusable(x_BTD, self.up_proj):
            return self.down_proj(fused_linear(x_BTD, self.fused, self.up_proj))
        return self.down_proj(self.activation(self.up_proj(x_BTD)))

    def init_state(self, batch: int, max_tokens: int, device: torch.device | None = None) -> Any:
        """Return the empty state; None where nothing is remembered."""
        return None

    def input_linears(self) -> list[Linear]:
        """Return the maps that are all that reads the input (see `Mixer.input_linears`)."""
        return [self.up_proj]

    def output_linear(self) -> Linear | None:
        """Return the map whose result is the FFN's; None where there is none."""
        return self.down_proj


class GeluMLP(FFN):
    """GELU, tanh form. Source: Hendrycks and Gimpel 2016, section 2."""

    fused: ClassVar[str] = "gelu"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return gelu(hidden)."""
        return F.gelu(hidden_BTF, approximate="tanh")


class ReluMLP(FFN):
    """ReLU. Source: Vaswani et al. 2017, equation 2."""

    fused: ClassVar[str] = "relu"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return relu(hidden)."""
        return F.relu(hidden_BTF)


class SquaredReluMLP(FFN):
    """Squared ReLU. Source: So et al. 2021, "Primer", section 3.1."""

    fused: ClassVar[str] = "relu2"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return relu(hidden)^2."""
        return F.relu(hidden_BTF).square()


class SiluMLP(FFN):
    """SiLU. Source: Elfwing et al. 2018, "Sigmoid-Weighted Linear Units", equation 7."""

    fused: ClassVar[str] = "silu"

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return hidden * sigmoid(hidden)."""
        return F.silu(hidden_BTF)
