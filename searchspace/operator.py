"""What mixers and FFNs have in common: options, named axes, initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from searchspace.errors import UserError, unknown
from searchspace.linear import Linear
from searchspace.specs import FFNSpec, MixerSpec, Options

OF_CHECKPOINTS = ("bias", "qk_norm")
"""Options that networks from elsewhere come with; no preset offers them to the search."""


class Operator(nn.Module):
    """A mixer or FFN built at its final size from its spec.

    Args:
        spec: what to build.
    """

    spec: MixerSpec | FFNSpec

    options: ClassVar[dict[str, Any]] = {}
    """Its own options with their defaults; whole numbers and strings."""
    option_choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Allowed values of options; a whole number not listed here must be at least 1."""
    axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Named dimension of every axis of every parameter (see `param_axes`)."""
    onnx: ClassVar[str] = ""
    """Why it cannot be exported to ONNX; empty where it can."""

    def __init_subclass__(cls) -> None:
        """Add the options of the parent class to those that a subclass declares."""
        parent = cls.__mro__[1]
        cls.options = {**getattr(parent, "options", {}), **cls.options}
        cls.option_choices = {**getattr(parent, "option_choices", {}), **cls.option_choices}

    @classmethod
    def param_axes(cls, spec: Any) -> dict[str, tuple[str, ...]]:
        """Return `axes` for a spec; overridden where options add or drop parameters."""
        return cls.axes

    @classmethod
    def check_options(cls, name: str, options: Mapping[str, Any]) -> None:
        """Raise a `UserError` for an option value that is not allowed; all options are given."""
        for option, value in options.items():
            default, choices = cls.options[option], cls.option_choices.get(option)
            if choices is not None:
                if value not in choices or type(value) is not type(default):
                    raise unknown(f"{name}.{option}", value, map(str, choices))
            elif type(value) is not type(default) or (isinstance(value, int) and value < 1):
                kind = "a whole number of at least 1" if isinstance(default, int) else "a text"
                raise UserError(f"{name}.{option}={value!r} must be {kind}")

    @classmethod
    def settle_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Return all options, with those that have no effect beside the others at their default."""
        return options

    def option(self, name: str) -> Any:
        """Return the value of an option; its default where the spec does not give it."""
        return self.option_of(self.spec, name)

    @classmethod
    def option_of(cls, spec: MixerSpec | FFNSpec, name: str) -> Any:
        """Return the value of an option in a spec, without a module."""
        return dict(spec.options).get(name, cls.options[name])

    def input_linears(self) -> list[Linear]:
        """Return the maps that are all that reads the input; empty where something else does.

        A foldable norm in front of the operator is merged into them.
        """
        return []

    def output_linear(self) -> Linear | None:
        """Return the map whose result is the operator's; None where there is none."""
        return None

    def reset(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter; output projections shrink with the `depth`."""
        last = self.output_linear()
        for module in self.children():
            if isinstance(module, Linear):
                module.reset(generator, 1.0 / math.sqrt(2 * max(depth, 1)) if module is last else 1)


def canonical_options(
    kind: str, name: str, operator: type[Operator], options: Options | Mapping[str, Any]
) -> Options:
    """Check an operator's options; return those that are not at their default, sorted.

    So an option added later changes no existing id.

    Args:
        kind: ``"mixer"`` or ``"ffn"``, for messages.
        name: of the operator in its registry.
        operator: its class.
        options: pairs or a mapping of option and value.

    Raises:
        UserError: for an unknown option or a value that is not allowed.
    """
    defaults = operator.options
    try:
        given = dict(options)
    except (TypeError, ValueError):
        raise UserError(f"{kind}_options={options!r:.40} is no mapping of options") from None
    for option in given:
        if option not in defaults:
            if not defaults:
                raise UserError(f"{kind} {name!r} has no options, but {option!r} was given")
            raise unknown(f"option of {kind} {name!r}", option, defaults)
    settled = operator.settle_options({**defaults, **given})
    operator.check_options(name, settled)
    return tuple(sorted(item for item in settled.items() if item[1] != defaults[item[0]]))
