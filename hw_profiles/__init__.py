"""What the hardware costs: devices, workloads, the timing protocol and latency tables."""

from hw_profiles.device import Device
from hw_profiles.process import ProcessSettings, prepare_process
from hw_profiles.workload import Workload, decode, prefill

__all__ = ["Device", "ProcessSettings", "Workload", "decode", "prefill", "prepare_process"]
