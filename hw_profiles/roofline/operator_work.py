"""What a sub-block computes and moves: floating-point operations and bytes of every operator.

The sub-block is really run, once, on zeros. Fake tensors would see other operators: low-bit kernels
are chosen by what a real tensor's memory looks like, and constants that modules keep for later
would be kept without values.

Letters: M rows, K inner and N outer width of a product.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from hw_profiles.backends.eager import runner
from hw_profiles.process import single_threaded
from hw_profiles.tensors import tensors_in
from hw_profiles.workload import Workload
from searchspace.ends import example_inputs
from searchspace.packing import pack
from searchspace.specs import EndsSpec, SubBlockSpec
from searchspace.sub_blocks import build_sub_block

aten = torch.ops.aten

PRECISION_OF_DTYPE = {torch.int8: "int8", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Precision of a product by its factors' dtype; all others count as fp32."""
FP8 = torch.float8_e4m3fn
"""Processors multiply what they have converted from it; GPUs multiply it as it is."""
PRECISION_OF_KERNEL = {
    aten._weight_int8pack_mm: "int8_weight",
    aten._weight_int4pack_mm_for_cpu: "int4",
}
"""Kernels whose factors differ in dtype."""
WRITES_ONLY = {aten.copy_, aten.fill_, aten.zero_, aten.zeros_like, aten.ones_like, aten.new_zeros}
WRITES_ONLY |= {aten.full_like, aten.new_ones, aten.new_full}
"""Operators that do not read their first argument."""
READS_ROWS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operators that read no more of their first argument than they return."""
WRITES_ROWS = {aten.index_put_, aten.scatter_, aten.index_copy_}
"""Operators that write no more to their first argument than the others hold."""
MOVES_NOTHING = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided}


@dataclass(frozen=True, order=True)
class Operator:
    """One call of one operator.

    Args:
        precision: of a matrix product; empty for everything else.
        flops: of a matrix product; 0 for everything else.
        bytes_moved: what it reads and writes.
    """

    precision: str
    flops: float
    bytes_moved: float


@dataclass(frozen=True)
class Work:
    """What one pass of a sub-block does.

    Args:
        operators: what was called, and how often; views are not among them.
        num_views: operators that only look at memory in another way.
    """

    operators: tuple[tuple[Operator, int], ...]
    num_views: int

    @property
    def flops_by_precision(self) -> dict[str, float]:
        """FLOPs of matrix products by the precision they are computed in."""
        totals: dict[str, float] = {}
        for operator, count in self.operators:
            if operator.flops:
                done = totals.get(operator.precision, 0.0)
                totals[operator.precision] = done + count * operator.flops
        return totals

    @property
    def bytes_moved(self) -> float:
        """Bytes that all operators read and write."""
        return float(sum(count * operator.bytes_moved for operator, count in self.operators))

    @property
    def num_ops(self) -> int:
        """Operators called, views not counted."""
        return sum(count for _, count in self.operators)


@functools.lru_cache(maxsize=1 << 13)
def work(spec: SubBlockSpec, workload: Workload) -> Work:
    """Return what a packed sub-block does in one pass of a workload.

    A decode step starts from a state that holds `workload.tokens` tokens. What modules make once
    and keep (masks, kernel layouts) is not counted.

    Args:
        spec: the sub-block.
        workload: its batch and tokens.

    Source: Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2 (compute and
    memory time); Williams et al. 2009, "Roofline" (both per operator).
    """
    with torch.no_grad(), single_threaded():
        block = build_sub_block(spec).eval()
        for parameter in block.parameters():
            parameter.zero_()
        pack(block)
        call = runner(block, _inputs(spec, workload), workload)
        call()
        with OperatorCounter() as counter:
            call()
    return counter.work()


def _inputs(spec: SubBlockSpec, workload: Workload) -> Tensor:
    if isinstance(spec, EndsSpec):
        return example_inputs(spec, workload.batch, workload.new_tokens)
    return torch.zeros(workload.batch, workload.new_tokens, spec.d_model)


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Notes every operator that runs inside the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.operators: Counter[Operator] = Counter()
        self.num_views = 0
        # By the address of their memory; held, so that no other tensor takes its place.
        self._from_fp8: dict[int, Tensor] = {}

    def work(self) -> Work:
        """Return what has run."""
        return Work(tuple(sorted(self.operators.items())), self.num_views)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        if _is_view(func, inputs, outputs):
            self.num_views += 1
            return result
        kernel = func.overloadpacket
        if kernel is aten._to_copy and inputs[0].dtype == FP8:
            self._from_fp8[outputs[0].untyped_storage()._cdata] = outputs[0]
        flops = _flops(kernel, args, kwargs, result)
        precision = self._precision(kernel, inputs) if flops else ""
        moved = _bytes_moved(kernel, inputs, outputs)
        self.operators[Operator(precision, float(flops), float(moved))] += 1
        return result

    def _precision(self, kernel: Any, inputs: list[Tensor]) -> str:
        if all(tensor.untyped_storage()._cdata in self._from_fp8 for tensor in inputs):
            return "fp8"
        return PRECISION_OF_KERNEL.get(kernel) or PRECISION_OF_DTYPE.get(inputs[0].dtype, "fp32")


def _is_view(func: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    """Return whether nothing is computed: what comes out is memory that went in, unchanged."""
    if func._schema.is_mutable:
        return False
    addresses = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(func.is_view) or all(
        tensor.untyped_storage()._cdata in addresses for tensor in outputs
    )


def _bytes_moved(kernel: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if kernel in MOVES_NOTHING:
        return 0
    written = sum(_size(tensor) for tensor in outputs)
    if kernel in READS_ROWS:
        return 2 * written + sum(_size(tensor) for tensor in inputs[1:])
    if kernel in WRITES_ROWS:
        return 2 * sum(_size(tensor) for tensor in inputs[1:])
    read = inputs[1:] if kernel in WRITES_ONLY else inputs
    return written + sum(_size(tensor) for tensor in read)


def _size(tensor: Tensor) -> int:
    """Return the bytes behind a tensor; an expanded one has fewer than it has elements."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    elements = math.prod(size for size, stride in sides if stride or not size)
    return min(elements * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if kernel in FLOPS:
        return FLOPS[kernel](args, result)
    if kernel in flop_registry:
        return int(flop_registry[kernel](*args, **kwargs, out_val=result))
    return 0


def _product(args: tuple[Any, ...], out_MN: Tensor) -> int:
    """Return the FLOPs of a product whose first argument is (M, K)."""
    return int(2 * out_MN.numel() * args[0].shape[-1])


def _attention(args: tuple[Any, ...], result: Any) -> int:
    query, key, value = args[:3]
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


FLOPS: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    aten._int_mm: _product,
    aten._weight_int8pack_mm: _product,
    aten._weight_int4pack_mm_for_cpu: _product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""Operators that PyTorch's own FLOP counter does not know."""
