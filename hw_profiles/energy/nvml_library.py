"""NVML through the C library of NVIDIA's driver, by the names of the package pynvml."""

from __future__ import annotations

import ctypes

from hw_profiles.backends.cuda.device import NVML

TEXT_BYTES = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE."""


class NvmlError(Exception):
    """What NVML answered when it could not do what it was asked for."""


class NvmlLibrary:
    """The few functions that energy meters need; each raises an `NvmlError` where it fails.

    Raises:
        OSError: when there is no driver.

    Source: NVIDIA, NVML API Reference Guide, Device Queries.
    """

    NVMLError = NvmlError

    def __init__(self) -> None:
        self._library = ctypes.CDLL(NVML)

    def nvmlInit(self) -> None:
        """Start; calling it again is harmless."""
        self._call("nvmlInit_v2")

    def nvmlDeviceGetCount(self) -> int:
        """Return how many GPUs the driver knows."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return count.value

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:
        """Return a GPU by its number."""
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> ctypes.c_void_p:
        """Return a GPU by its UUID, such as ``"GPU-1f0c..."``."""
        handle = ctypes.c_void_p()
        text = ctypes.c_char_p(uuid.encode())
        self._call("nvmlDeviceGetHandleByUUID", text, ctypes.byref(handle))
        return handle

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p) -> str:
        """Return a GPU's name."""
        return self._text("nvmlDeviceGetName", handle)

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p) -> str:
        """Return a GPU's UUID."""
        return self._text("nvmlDeviceGetUUID", handle)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p) -> int:
        """Return the energy since the driver was loaded, in millijoule."""
        energy_mj = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(energy_mj))
        return energy_mj.value

    def _text(self, function: str, handle: ctypes.c_void_p) -> str:
        text = ctypes.create_string_buffer(TEXT_BYTES)
        self._call(function, handle, text, ctypes.c_uint(TEXT_BYTES))
        return text.value.decode()

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            say = self._library.nvmlErrorString
            say.restype = ctypes.c_char_p
            raise NvmlError((say(status) or b"unknown error").decode())
