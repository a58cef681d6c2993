"""ONNX Runtime on the CPU: what a small network would be deployed with."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hw_profiles.backends.base import Call, UnsupportedError
from hw_profiles.backends.eager import SENTINEL_SIZE
from hw_profiles.backends.onnx_runtime.builder import element_type
from hw_profiles.backends.onnx_runtime.export import Exported, export, matrix_product
from hw_profiles.clock import Clock, system_clock
from hw_profiles.workload import Workload
from searchspace.subnet import Subnet

PROVIDER = "CPUExecutionProvider"
ERRORS_ONLY = 3


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU provider, at fixed shapes and with the result written in place.

    A decode step takes the state as inputs and returns the new one as outputs, other memory: each
    call starts from the same state. Charged is all of that, except for caches of keys and values:
    output and input are the same memory there, so that only the new token is written, where the
    last call wrote it too.

    Weights keep the precision they have, but for bf16, for which ONNX Runtime's CPU provider has no
    products: it holds and multiplies fp32 (rounded to bf16). Weight-only maps (`int8_weight`,
    `int4`) round activations to int8 in groups of 32 where that is faster; `int8` and `ternary`
    are computed exactly as in PyTorch.
    """

    name = "onnxruntime"
    summary = "ONNX Runtime on the CPU"

    def unavailable(self) -> str:
        """Return which packages to install, if one is missing."""
        missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
        return f"install {' and '.join(missing)}" if missing else ""

    def version(self) -> str:
        """Return the version with the provider and the level of optimisation."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}, {PROVIDER}, all graph optimisations"

    def accelerator(self) -> str:
        """Return an empty text: none is used."""
        return ""

    def prepare(self, module: nn.Module, inputs: Tensor, workload: Workload) -> Call:
        """Return a call; see `Backend.prepare`."""
        try:
            exported = export(module, inputs, workload)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"backend {self.name!r} cannot run {_name_of(module)}: ONNX Runtime has no form "
                f"of {error}; leave this operator out or use backend 'eager'"
            ) from error
        return _bound_call(exported)

    def sentinel(self) -> Call:
        """Return a matrix product with a constant matrix, as the layers of a network have it."""
        generator = torch.Generator().manual_seed(0)
        left, right = torch.randn(2, SENTINEL_SIZE, SENTINEL_SIZE, generator=generator)
        return _bound_call(matrix_product(left, right))

    def clock(self) -> AbstractContextManager[Clock]:
        """Return the system's clock."""
        return system_clock()


def _name_of(module: nn.Module) -> str:
    """Return what a user knows a module by."""
    if isinstance(module, Subnet):
        return f"network {module.arch.id}"
    spec = getattr(module, "spec", None)
    return f"sub-block {spec.key!r}" if spec is not None else type(module).__name__


def open_session(model: bytes | str) -> Any:
    """Return a session of a model or its file, with as many threads as PyTorch has.

    Every session has threads of its own, beyond the first. They would go on spinning for a while
    after a call and keep the processors from the next session, so they are told to stop at the end
    of each call; of dozens of sessions with two threads more samples are then undisturbed, at the
    same latencies. One pool for all would bind every other session of the process to it, for good.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # As `prepare_process` does for PyTorch; masked scores become denormal numbers in a softmax.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return onnxruntime.InferenceSession(model, options, providers=[PROVIDER])


def _bound_call(exported: Exported) -> Call:
    """Return a call that runs a model in place: nothing is allocated, converted or copied."""
    session = open_session(exported.model)
    binding = session.io_binding()
    for name, tensor in exported.inputs.items():
        binding.bind_input(name, *_memory(tensor))
    for name, tensor in exported.outputs.items():
        binding.bind_output(name, *_memory(tensor))
    run, result = session.run_with_iobinding, next(iter(exported.outputs.values()))
    # The binding knows addresses only; the tensors must live as long as it.
    tensors = [*exported.inputs.values(), *exported.outputs.values()]

    def call(_held: list[Tensor] = tensors) -> Tensor:
        run(binding)
        return result

    return call


def _memory(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """Return device, its number, element type, shape and address."""
    return "cpu", 0, element_type(tensor.dtype), tuple(tensor.shape), tensor.data_ptr()
