"""Running operators for their shapes only: the memory of a pass without its arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hw_profiles.tensors import tensors_in
from searchspace.errors import UserError

SHAPES_KEPT = 1 << 16
"""Results of operators that are remembered; some mixers call one for every token."""


class Layout(NamedTuple):
    """What is left of a tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class DryRun(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Leaves out every operator that reads a hollow tensor; what it returns is hollow as well.

    Hollow tensors are ordinary CPU tensors whose memory is never touched, so that Python code and
    PyTorch's dispatcher take the very paths of a real run. `FakeTensor` is a subclass, which
    kernels here treat as a graph being captured, and meta tensors are sent past the fused CPU
    kernels. What does not depend on a hollow tensor, such as masks and position tables that are
    kept for later, is computed.

    Args:
        hollow: tensors without values: inputs and, of a network that was never made, weights.
    """

    def __init__(self, hollow: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self._hollow: set[int] = set()
        for tensor in hollow:
            self.hollow_out(tensor)

    def hollow_out(self, tensor: Tensor) -> Tensor:
        """Say that a tensor has no values; returns it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._hollow:
            self._hollow.add(storage._cdata)
            weakref.finalize(storage, self._hollow.discard, storage._cdata).atexit = False
        return tensor

    def is_hollow(self, tensor: Tensor) -> bool:
        """Whether a tensor has no values."""
        return tensor.untyped_storage()._cdata in self._hollow

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator for its shapes.

        Raises:
            UserError: for an operator whose result depends on values.
        """
        kwargs = kwargs or {}
        if not any(self.is_hollow(tensor) for tensor in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        if _only_looks(func):
            return func(*args, **kwargs)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            for tensor in written:
                self.hollow_out(tensor)
            return written[0]
        result = tree_map(_made, result_layouts(func, args, kwargs), is_leaf=_is_layout)
        for tensor in tensors_in(result):
            self.hollow_out(tensor)
        return result


def _only_looks(func: OpOverload[..., Any]) -> bool:
    """Whether an operator returns views and computes nothing."""
    if func is torch.ops.aten._unsafe_view.default:
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


_layouts: dict[Any, Any] = {}


def result_layouts(func: OpOverload[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what an operator returns, with a `Layout` in the place of each tensor."""
    key = (func, _hashable(args), _hashable(kwargs))
    if key not in _layouts:
        if len(_layouts) >= SHAPES_KEPT:
            _layouts.clear()
        try:
            found = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"peak memory cannot be computed without running: operator {func} needs values "
                f"({str(error).splitlines()[0]}); use measured_peak_mib"
            ) from error
        _layouts[key] = tree_map(_layout, found)
    return _layouts[key]


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return type(value), value


def _layout(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Layout(tuple(value.shape), value.stride(), value.dtype)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _is_layout(value: Any) -> bool:
    return isinstance(value, Layout)


def _made(value: Any) -> Any:
    if not isinstance(value, Layout):
        return value
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype)
