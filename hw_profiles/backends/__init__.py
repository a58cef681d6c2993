"""How networks are run: one file per backend, one line in `BACKENDS`."""

from __future__ import annotations

from hw_profiles.backends.base import Backend, Call, UnsupportedError
from hw_profiles.backends.compiled import CompiledBackend
from hw_profiles.backends.cuda import CudaBackend
from hw_profiles.backends.eager import EagerBackend
from hw_profiles.backends.onnx_runtime import OnnxRuntimeBackend
from searchspace.errors import UserError, unknown

BACKENDS: dict[str, type[Backend]] = {
    "eager": EagerBackend,
    "compiled": CompiledBackend,
    "onnxruntime": OnnxRuntimeBackend,
    "cuda": CudaBackend,
}

__all__ = ["BACKENDS", "Backend", "Call", "UnsupportedError", "get_backend"]


def get_backend(name: str) -> Backend:
    """Return a backend that this machine can use.

    Raises:
        UserError: for an unknown name, or saying what the machine lacks.
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    backend = BACKENDS[name]()
    if lacking := backend.unavailable():
        raise UserError(f"backend {name!r} cannot be used here: {lacking}")
    return backend
