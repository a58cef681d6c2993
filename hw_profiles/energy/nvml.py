"""Energy counters of NVIDIA GPUs: NVML."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from hw_profiles.energy.nvml_library import NvmlLibrary


@dataclass(frozen=True)
class NvmlMeter:
    """The counter of one GPU, memory and board included.

    Args:
        name: such as ``"NVML NVIDIA H100 80GB HBM3 GPU-1f0c..."``.
        nvml: the module that reads it.
        handle: of the GPU.

    Source: NVIDIA, NVML API Reference Guide, nvmlDeviceGetTotalEnergyConsumption (millijoule since
    the driver was loaded; Volta and newer).
    """

    name: str
    nvml: Any = field(repr=False)
    handle: Any = field(repr=False)
    wraps_at_mj: float = math.inf
    kind: str = "gpu"

    def read_mj(self) -> float:
        """Return the counter in millijoule."""
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))


def nvml_meters() -> tuple[list[NvmlMeter], list[str]]:
    """Return the meters of the GPUs, and why there are no others.

    Where PyTorch sees a CUDA device, only the current one; else every GPU the driver knows.
    """
    try:
        nvml = _nvml()
    except OSError:
        return [], ["NVIDIA's driver, whose library tells the energy of GPUs, is not installed"]
    try:
        nvml.nvmlInit()
        handles = _handles(nvml)
    except nvml.NVMLError as error:
        return [], [f"NVIDIA's driver does not answer ({error})"]
    meters, reasons = [], []
    for handle in handles:
        name = "a GPU"
        try:
            name = (
                f"{_text(nvml.nvmlDeviceGetName(handle))} {_text(nvml.nvmlDeviceGetUUID(handle))}"
            )
            meter = NvmlMeter(f"NVML {name}", nvml, handle)
            meter.read_mj()
        except nvml.NVMLError as error:
            reasons.append(f"{name} has no energy counter ({error}); MIG slices never have one")
        else:
            meters.append(meter)
    return meters, reasons


def _nvml() -> Any:
    """Return the package that reads the counters, or what does the same without it.

    Raises:
        OSError: when there is no driver.
    """
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return NvmlLibrary()


def _handles(nvml: Any) -> list[Any]:
    if not torch.cuda.is_available():
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    # Environment variables renumber and hide GPUs for CUDA but not for NVML.
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    uuid = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        return [nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")]
    except nvml.NVMLError:
        return [nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
