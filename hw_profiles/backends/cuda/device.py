"""What CUDA device this is, in words."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

NVML = "libnvidia-ml.so.1"
NVML_TEXT_BYTES = 96
"""Longest text of NVML: NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE is 80."""
KERNEL_MODULE = Path("/sys/module/nvidia/version")


def lacking_device() -> str:
    """Return what is missing for CUDA, with what to do; empty where a device can be used."""
    if torch.cuda.is_available() and torch.version.cuda:
        return ""
    if torch.version.cuda is None:
        what = f"PyTorch {torch.__version__} was built without CUDA: install a build with it"
    else:
        what = "check that nvidia-smi lists a GPU and that CUDA_VISIBLE_DEVICES does not hide it"
    return f"no CUDA device is visible to PyTorch; {what}, or choose another backend"


@functools.cache
def describe_device(index: int) -> str:
    """Return name, architecture, size, driver and CUDA version of a device.

    The name of a MIG slice says so, with its profile; its number of multiprocessors is the
    slice's. Clocks are as the driver leaves them.
    """
    facts = torch.cuda.get_device_properties(index)
    driver = driver_version() or "unknown"
    return (
        f"{facts.name} (sm_{facts.major}{facts.minor}, {facts.multi_processor_count} SMs, "
        f"driver {driver}, CUDA {torch.version.cuda})"
    )


def driver_version() -> str:
    """Return the version of NVIDIA's driver, such as ``"570.86.15"``; empty where it is unknown.

    From the library that comes with the driver, so that it does not depend on Python packages.

    Source: NVIDIA, NVML API Reference Guide, nvmlSystemGetDriverVersion.
    """
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return KERNEL_MODULE.read_text().strip() if KERNEL_MODULE.exists() else ""
    if nvml.nvmlInit_v2() != 0:
        return ""
    text = ctypes.create_string_buffer(NVML_TEXT_BYTES)
    failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(NVML_TEXT_BYTES))
    nvml.nvmlShutdown()
    return "" if failed else text.value.decode()
