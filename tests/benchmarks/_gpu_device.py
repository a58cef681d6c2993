"""What a GPU is, and what it can do at most: facts, clocks and measured roofs.

NVML is called through its C library, as the Python package need not be there.
"""

from __future__ import annotations

import ctypes
import datetime
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks._gpu_timing import Clock, host_seconds

SM_CLOCK, MEMORY_CLOCK = 1, 2
ROOF_SAMPLES = 15


class Nvml:
    """Readings of one GPU; each is None where it cannot be had.

    Args:
        device: a CUDA device of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.library: Any = None
        self.handle = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            name = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode()
            if library.nvmlInit_v2() == 0:
                found = library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self.handle))
                self.library = library if found == 0 else None
        except (OSError, AttributeError):
            self.library = None

    def clock_mhz(self, which: int = SM_CLOCK) -> int | None:
        """Return a clock as it is now."""
        return self._number("nvmlDeviceGetClockInfo", which)

    def temperature_c(self) -> int | None:
        """Return the chip's temperature."""
        return self._number("nvmlDeviceGetTemperature", 0)

    def power_w(self) -> float | None:
        """Return the power drawn."""
        milliwatts = self._number("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000.0

    def driver(self) -> str | None:
        """Return the driver's version."""
        if self.library is None:
            return None
        text = ctypes.create_string_buffer(96)
        failed = self.library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96))
        return None if failed else text.value.decode()

    def _number(self, function: str, *arguments: int) -> int | None:
        if self.library is None:
            return None
        number = ctypes.c_uint()
        failed = getattr(self.library, function)(self.handle, *arguments, ctypes.byref(number))
        return None if failed else number.value


def facts(device: torch.device) -> dict[str, Any]:
    """Return device, versions and date."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }
    if device.type == "cuda":
        properties, nvml = torch.cuda.get_device_properties(device), Nvml(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": nvml.driver(),
            "cuda": torch.version.cuda,
        }
    return found


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def measured_roofs(device: torch.device, clock: Clock, quick: bool) -> dict[str, float]:
    """Return copy bandwidth in GB/s, bytes read and written, and the rate of products in TFLOP/s.

    A product that the device does not have is left out. Inputs are random: a GPU was seen to
    multiply zeros an eighth faster.
    """
    roofs = _bandwidths(1 << (20 if quick else 30), device, clock)
    side = 128 if quick else 8192
    for name, product in _products(side, device).items():
        try:
            roofs[name] = 2 * side**3 / _median_s(product(), clock) / 1e12
        except (RuntimeError, NotImplementedError):
            continue
    return roofs


def _bandwidths(size: int, device: torch.device, clock: Clock) -> dict[str, float]:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "copy_gb_s": 2 * size / _median_s(lambda: target.copy_(source), clock) / 1e9,
        "read_gb_s": size / _median_s(lambda: source.view(torch.float32).sum(), clock) / 1e9,
    }


def _products(side: int, device: torch.device) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    def floating(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b.t()

    def fp8() -> Callable[[], Tensor]:
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    def int8() -> Callable[[], Tensor]:
        a, b = (
            torch.randint(-127, 127, (side, side), device=device).to(torch.int8) for _ in range(2)
        )
        return lambda: torch._int_mm(a, b.t())

    products: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "bf16_tflop_s": lambda: floating(torch.bfloat16),
        "int8_tflop_s": int8,
    }
    # CPUs emulate it, at a hundredth of the speed.
    return products | ({"fp8_tflop_s": fp8} if device.type == "cuda" else {})


def _median_s(call: Callable[[], Any], clock: Clock) -> float:
    call()
    host_s = host_seconds(call, clock)
    return statistics.median(clock.sample_s([call], host_s) for _ in range(ROOF_SAMPLES))
