"""Energy of whole networks, where the machine has meters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hw_profiles.backends import get_backend
from hw_profiles.energy import MIN_WINDOW_S, energy_meters, measure_energy_mj
from hw_profiles.workload import Workload
from searchspace.ends import example_inputs
from searchspace.subnet import Subnet


def measure_energies_mj(
    subnets: Mapping[str, Subnet], workloads: Sequence[Workload], backend: str, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return the energy of one run of each network, in millijoule.

    Args:
        subnets: packed networks in evaluation mode, by any id.
        workloads: what to run.
        backend: a name in `BACKENDS`.
        seed: of the inputs.

    Returns:
        By id and workload name; what cannot be measured is absent, and without a meter of the
        backend's device everything is.
    """
    runs_on = get_backend(backend)
    kind = "gpu" if runs_on.accelerator() else "cpu"
    meters = [meter for meter in energy_meters() if meter.kind == kind]
    if not meters:
        return {}
    generator = torch.Generator().manual_seed(seed)
    energies: dict[str, dict[str, float]] = {}
    for name, network in subnets.items():
        for workload in workloads:
            ends = network.arch.ends
            inputs = example_inputs(ends, workload.batch, workload.new_tokens, generator)
            call = runs_on.prepare(network, inputs, workload)
            with runs_on.clock() as clock:
                reading = measure_energy_mj(call, MIN_WINDOW_S, meters, clock)
            if reading is not None:
                energies.setdefault(name, {})[workload.name] = reading.energy_mj
    return energies
