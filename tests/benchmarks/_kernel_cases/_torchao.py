"""torchao's quantised linear maps, compiled as its documentation asks for.

It quantises the same weight by itself, so results differ by what rounding does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks._kernel_cases.case import Contender, Inputs, Setting

GROUP = 32
ROUNDED = 0.2
"""RMS ratio of a product with another rounding to 4 bits."""


def int4_contender(setting: Setting) -> Contender:
    """Return weight-only int4 in groups, packed for the tensor cores of any GPU."""

    def config() -> Any:
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")

    return _contender(setting, config, ROUNDED)


def int8_contender(setting: Setting, bound: float) -> Contender:
    """Return int8 weights with activations quantised as they come."""

    def config() -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)

    return _contender(setting, config, bound)


def _contender(setting: Setting, config: Any, bound: float) -> Contender:
    def build(fast: Any, given: Inputs) -> Any:
        from torchao.quantization import quantize_

        rows, columns = given["w"].shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(given["w"].clone(), requires_grad=False)
        quantize_(linear, config())
        return lambda: (fast(given["x"], linear.weight),)

    compiled = setting.compiled("torchao", _linear, build, bound=bound)
    return replace(compiled, missing=setting.needs("torchao"))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)
