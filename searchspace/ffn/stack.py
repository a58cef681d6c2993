"""A feed-forward network with more than one hidden layer.

Shapes: B batch, T tokens, D d_model, F hidden units, I inner units.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from searchspace.ffn.mlp import FFN
from searchspace.linear import Linear
from searchspace.specs import FFNSpec


class GeluStack(FFN):
    """Maps of widths F, I, ..., I with GELU (erf form) after each, then back to D.

    Options: `num_inner` maps of width `inner_size` stand between `up_proj` and the last map. With
    none it is a two-matrix FFN. The last map reads other units then, so that it is a parameter of
    its own on shared weights: `down_proj` reads the F hidden units, `inner_down_proj` the last
    inner ones.

    Source: Tuli et al. 2022, "FlexiBERT", section 3.1 (feed-forward stacks); Hendrycks and Gimpel
    2016, section 2 (GELU, exact form as in BERT and ELECTRA).
    """

    options: ClassVar[dict[str, Any]] = {"num_inner": 0, "inner_size": 512}
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"num_inner": (0, 1, 2)}

    def __init__(self, spec: FFNSpec) -> None:
        super().__init__(spec)
        width, inner = spec.intermediate_size, int(self.option("inner_size"))
        self.inner = nn.ModuleList()
        for _ in range(int(self.option("num_inner"))):
            self.inner.append(self.linear(width, inner))
            width = inner
        if self.inner:
            del self.down_proj
            self.inner_down_proj = self.linear(width, spec.d_model)

    @classmethod
    def param_axes(cls, spec: FFNSpec) -> dict[str, tuple[str, ...]]:
        """Return the axes of the maps that there are."""
        num_inner = int(cls.option_of(spec, "num_inner"))
        if not num_inner:
            return super().param_axes(spec)
        widths = ["intermediate_size"] + ["inner_size"] * num_inner
        inner = {
            f"inner.{number}.weight": ("inner_size", before)
            for number, before in enumerate(widths[:-1])
        }
        axes = {
            "up_proj.weight": cls.axes["up_proj.weight"],
            **inner,
            "inner_down_proj.weight": ("d_model", "inner_size"),
        }
        return cls.with_biases(spec, axes)

    @classmethod
    def settle_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options, the width of inner maps at its default where there are none."""
        if options["num_inner"]:
            return options
        return {**options, "inner_size": cls.options["inner_size"]}

    def activation(self, hidden_BTF: Tensor) -> Tensor:
        """Return gelu(hidden)."""
        return F.gelu(hidden_BTF)

    def forward(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """Map each token on its own, same shape."""
        hidden = self.activation(self.up_proj(x_BTD))
        for linear in self.inner:
            hidden = self.activation(linear(hidden))
        return self.output_linear()(hidden)

    def output_linear(self) -> Linear:
        """Return the last map."""
        return self.inner_down_proj if self.inner else self.down_proj

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter; the last map shrinks with the `depth`."""
        super().reset(generator, depth)
        for linear in self.inner:
            assert isinstance(linear, Linear)
            linear.reset(generator)
