"""What networks really lose and cost: test files, and all of them timed interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw_profiles.energy.networks import measure_energies_mj
from hw_profiles.memory import peak_mib
from hw_profiles.subnets import measure_subnets
from hw_profiles.workload import Workload
from nas.calibration import calibrated_extract
from nas.candidates import SpaceCodec
from nas.config import ExportConfig
from nas.evaluation import evaluation_amount, held_out_accuracy, held_out_loss
from nas.front.comparison import compare
from nas.front.selection import random_archs, select_front, uniform_networks
from nas.front.sources import FrontSources
from nas.progress import Reporter
from nas.study import Evaluated
from searchspace.arch import Arch
from searchspace.cost import arch_cost, num_params, weight_bytes
from searchspace.files import read_json, write_json
from searchspace.subnet import Subnet


def measure_front(
    sources: FrontSources,
    items: Sequence[Evaluated],
    codec: SpaceCodec,
    config: ExportConfig,
    folder: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Measure the final front and its baselines; return the content of `front.json`.

    Test losses and accuracies are kept in `measurements.json` as they come, so an interrupted stage
    goes on.
    """
    chosen = select_front(items, config.front_size)
    uniform = uniform_networks(sources.space)
    groups = {
        "front": [(item.arch, "") for item in chosen],
        "random": [
            (arch, "") for arch in random_archs(sources.space, codec, len(chosen), sources.seed)
        ],
        "uniform": [(arch, name) for name, arch in uniform.items()],
    }
    archs = {arch.id: arch for members in groups.values() for arch, _ in members}
    qualities = test_qualities(sources, archs, config.test_tokens, folder, reporter)
    latencies, peaks, energies = _costs(sources, archs, reporter)
    search_losses = {item.arch.id: item.values[sources.objectives.names.index("loss")]
                     for item in items}  # fmt: skip

    def record(arch: Arch, name: str) -> dict[str, Any]:
        predicted = {w.name: sources.table.latency_ms(arch, w) for w in sources.table.workloads}
        return {
            "arch_id": arch.id,
            "name": name or None,
            "arch": arch.to_dict(),
            "params": int(arch_cost(arch, num_params)),
            "weight_bytes": int(arch_cost(arch, weight_bytes)),
            "measured": {
                **qualities[arch.id],
                "latency_ms": latencies[arch.id],
                "peak_mib": peaks[arch.id],
                **({"energy_mj": energies[arch.id]} if arch.id in energies else {}),
            },
            "predicted": {"latency_ms": predicted},
            "search_loss": search_losses.get(arch.id),
        }

    records = {group: [record(*member) for member in members] for group, members in groups.items()}
    return compare(sources, records)


def test_qualities(
    sources: FrontSources,
    archs: Mapping[str, Arch],
    num_tokens: int,
    folder: Path,
    reporter: Reporter,
) -> dict[str, dict[str, float]]:
    """Return loss, and accuracy where the task is judged by it, on the test split by arch id."""
    task = sources.task
    path = folder / "measurements.json"
    stored = read_json(path, "measurements") if path.exists() else {}
    # Only whole records count: a release that measured less wrote plain numbers.
    qualities: dict[str, dict[str, float]] = {
        arch_id: record
        for arch_id, record in stored.get(str(num_tokens), {}).items()
        if isinstance(record, dict)
    }
    batches = task.evaluation_batches("test", evaluation_amount(task, num_tokens), 8)
    with reporter.bar("test losses") as bar:
        for index, (arch_id, arch) in enumerate(archs.items()):
            if arch_id not in qualities:
                model = calibrated_extract(sources.supernet, arch, task).pack()
                qualities[arch_id] = {"loss": held_out_loss(model, batches, task)}
                if task.metric_name == "accuracy":
                    qualities[arch_id]["accuracy"] = held_out_accuracy(model, batches)
                write_json(path, {str(num_tokens): qualities})
            bar.update((index + 1) / len(archs))
    return qualities


def _costs(
    sources: FrontSources, archs: Mapping[str, Arch], reporter: Reporter
) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, dict[str, float]]]:
    """Time all networks interleaved, in their packed form.

    Returns:
        Latencies in ms by arch id and workload, peak memory in MiB by arch id, and energies in mJ
        by arch id and workload, which are absent where the machine has no meter.
    """
    subnets: dict[str, Subnet] = {
        arch_id: sources.supernet.extract(arch).pack().eval().requires_grad_(False)
        for arch_id, arch in archs.items()
    }
    workloads: list[Workload] = list(sources.table.workloads)
    primary = Workload.parse(sources.workload)
    with reporter.bar("measure latency") as bar:
        timings = measure_subnets(
            subnets,
            workloads,
            backend=sources.table.device.backend,
            reference_us=sources.table.sentinel_us,
            seed=sources.seed,
            progress=bar.update,
        )
    latencies = {
        arch_id: {name: timing.latency_us / 1e3 for name, timing in by_workload.items()}
        for arch_id, by_workload in timings.items()
    }
    peaks = {arch_id: peak_mib(net, primary) for arch_id, net in subnets.items()}
    energies = measure_energies_mj(
        subnets, workloads, sources.table.device.backend, seed=sources.seed
    )
    return latencies, peaks, energies
