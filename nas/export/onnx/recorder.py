"""PyTorch modules as ONNX graphs for any sizes.

The operators run on tensors without values, whose sizes are symbols (`torch.fx`'s symbolic
integers, which `torch.export` uses too), and each is translated by the profiler's tables. Branches
are taken as for large sizes; the forms that this chooses hold for small ones as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_flatten, tree_map_only

from hw_profiles.backends.onnx_runtime.builder import Builder, Value
from hw_profiles.backends.onnx_runtime.capture import capturing
from hw_profiles.backends.onnx_runtime.export import HANDLERS, Recorder
from nas.export.onnx.builder import FreeBuilder
from nas.export.onnx.factories import FACTORIES, FILLED, filling
from nas.export.onnx.loops import LOOPS
from nas_kernels.recurrence import one_operator_each

TRIED = (1, 2, 3, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 500)
"""Sizes that assumptions are tried with."""
POINTWISE = ("aten.clamp_min.default", "aten.clamp_max.default", "aten.masked_fill.Scalar")
"""Operators that treat numbers one by one, beside those that PyTorch says it of."""
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Recorded:
    """A graph.

    Args:
        builder: its nodes and constants.
        inputs: what it takes, in order.
        outputs: what it returns, in order.
    """

    builder: FreeBuilder
    inputs: list[Value]
    outputs: list[Value]


class Sizes:
    """Free sizes, and tensors without values that have them."""

    def __init__(self) -> None:
        self.environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self.symbols: dict[str, str] = {}
        """What a free size is called in expressions, by its name."""

    def free(self, name: str, hint: int) -> torch.SymInt:
        """Return a new free size; branches are taken as for `hint`."""
        source = ConstantSource(name)
        symbol = self.environment.create_symbol(
            hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        self.symbols[name] = str(symbol)
        made = self.environment.create_symintnode(symbol, hint=hint, source=source)
        return cast(torch.SymInt, made)

    def empty(self, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
        """Return a tensor without values."""
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def fixed(self) -> list[str]:
        """Return the equations that were taken for granted and hold for some sizes only."""
        found = [sympy.Eq(*pair) for pair in self.environment.replacements.items()]
        found += [guard.expr for guard in self.environment.guards]
        return [str(equation) for equation in found if not _holds(equation)]


def _holds(equation: sympy.Expr) -> bool:
    """Whether an equation holds for all of many sizes; true for what is none."""
    if not isinstance(equation, sympy.Eq):
        return True
    symbols = sorted(equation.free_symbols, key=str)
    for start, number in enumerate(TRIED):
        others = TRIED[start + 1 :] + TRIED[: start + 1]
        sizes = dict(zip(symbols, (number, *others), strict=False))
        if equation.xreplace({s: sympy.Integer(n) for s, n in sizes.items()}) is not sympy.true:
            return False
    return True


def record(
    run: Callable[..., list[Tensor]],
    sizes: Sizes,
    inputs: Mapping[str, Tensor],
    roots: Callable[[FreeBuilder, Mapping[str, Value]], Mapping[str, Value]],
    int8_tables: bool = False,
) -> Recorded:
    """Return the graph of a function of tensors.

    Args:
        run: has no side effects on its arguments.
        sizes: the free sizes.
        inputs: what `run` takes, in order, without values, by their names in the graph.
        roots: returns where the graph finds each free size, as int64 values (1,).
        int8_tables: whether tables that rows are looked up in are rounded to int8.

    Raises:
        NotImplementedError: naming what has no translation.
    """
    builder = FreeBuilder(int8_tables)
    # In inference mode PyTorch would not take its larger operators apart.
    with torch.inference_mode(False), torch.no_grad():
        recorder = FreeRecorder(sizes, inputs, builder)
        named = dict(zip(inputs, recorder.inputs, strict=True))
        for name, value in roots(builder, named).items():
            builder.roots[sizes.symbols[name]] = value
        with capturing(), one_operator_each(), recorder:
            results = run(*inputs.values())
        outputs = [builder.own(recorder.value(tensor)) for tensor in results]
    if fixed := sizes.fixed():
        raise NotImplementedError(f"sizes that are not free: {', '.join(fixed)}")
    return Recorded(builder, recorder.inputs, outputs)


class FreeRecorder(Recorder):
    """Records operators on tensors without values; those on constants alone it runs."""

    def __init__(self, sizes: Sizes, inputs: Mapping[str, Tensor], builder: Builder) -> None:
        super().__init__(list(inputs.values()), builder)
        self.mode = sizes.mode
        self.bases: dict[int, int] = {}
        """What tensors are views of; tensors are known by their identity."""
        self.viewed: set[int] = set()
        """Tensors that there are views of."""
        self.handlers = {**HANDLERS, **FACTORIES, **LOOPS}
        for value, name in zip(self.inputs, inputs, strict=True):
            value.name = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = str(func), kwargs or {}
        if name == "prim.device.default":
            return DEVICE
        leaves, _ = tree_flatten((args, kwargs))
        symbolic = any(isinstance(x, torch.SymInt | torch.SymFloat | FakeTensor) for x in leaves)
        if not symbolic:
            result = func(*args, **kwargs)
            if "_." in name:
                self.values[id(result)] = result, self.builder.known(result.clone())
            return result
        base = name.split(".")[1]
        if base in FILLED:
            return self._filled(func, base, args, kwargs)
        inputs = tree_map_only(Tensor, self.value, (args, kwargs))
        if "_." in name and not name.startswith("hwnas"):
            self._check_own(name, args[0])
        result = self._run(func, args, kwargs)
        self._translate(name, result, *inputs)
        if func.is_view:
            whole = self.bases.get(id(args[0]), id(args[0]))
            self.viewed.add(whole)
            for tensor in result if isinstance(result, Sequence) else [result]:
                self.bases[id(tensor)] = whole
        return result

    def _check_own(self, name: str, tensor: Tensor) -> None:
        """Raise `NotImplementedError` where a write would have to reach other tensors too."""
        viewed = self.bases.get(id(tensor), id(tensor)) in self.viewed
        if not isinstance(tensor, FakeTensor) or viewed:
            raise NotImplementedError(f"the operator {name} on a view")

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if "_." in str(func) and isinstance(args[0], FakeTensor):
            return args[0]
        if torch.Tag.pointwise in func.tags or str(func) in POINTWISE:
            return self._pointwise(func, args, kwargs)
        with enable_python_dispatcher(), self.mode:
            return func(*args, **kwargs)

    def _pointwise(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Return a result without values; PyTorch's own rules fail for some, and take longer."""
        shapes = [x.shape for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        ndim = max(len(shape) for shape in shapes)
        shape = [1] * ndim
        for given in shapes:
            for axis, size in enumerate(given, start=ndim - len(given)):
                if not (isinstance(size, int) and size == 1):
                    shape[axis] = size
        small = tree_map_only(
            Tensor, lambda x: torch.ones((1,) * x.ndim, dtype=x.dtype), (args, kwargs)
        )
        small = tree_map_only(torch.SymInt | torch.SymFloat, lambda _: 1, small)
        dtype = func(*small[0], **small[1]).dtype
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def _filled(self, func: Any, base: str, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Return a tensor filled with one number: a constant, unless its shape is free."""
        with self.mode:
            result: Tensor = func(*args, **kwargs)
        number = filling(base, args)
        constant = isinstance(number, bool | int | float)
        if constant and all(isinstance(size, int) for size in result.shape):
            return torch.full(tuple(result.shape), number, dtype=result.dtype)
        value = self.builder.full(tuple(result.shape), number, result.dtype)
        self.values[id(result)] = result, value
        return result
