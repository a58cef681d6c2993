"""The final front: chosen from the search, measured again, and compared with baselines.

Every group (front, random archs, uniform networks) inherits its weights from the same
supernet and is measured in the same interleaved session.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from hw_profiles.energy.networks import measure_energies_mj
from hw_profiles.latency_table import LatencyTable
from hw_profiles.memory import peak_mib
from hw_profiles.subnets import measure_subnets
from hw_profiles.workload import Workload
from nas.calibration import calibrated_extract
from nas.candidates import Objectives, SpaceCodec
from nas.config import ExportConfig
from nas.evaluation import evaluation_amount, held_out_accuracy, held_out_loss
from nas.pareto import greedy_hypervolume_subset, hypervolume, knee_index, non_dominated, normalise
from nas.progress import Reporter
from nas.study import Evaluated
from nas.tasks.base import Task
from nas.tasks.labelled import LabelledTask
from searchspace.arch import Arch
from searchspace.cost import arch_cost, num_params, weight_bytes
from searchspace.errors import UserError
from searchspace.files import read_json, write_json, write_text
from searchspace.space import SearchSpace
from searchspace.specs import ABSENT
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

Floats = NDArray[np.float64]
GROUPS = ("front", "random", "uniform")


@dataclass(frozen=True)
class FrontSources:
    """What the final measurements need.

    Args:
        space, supernet, task, table: of the run.
        objectives: of the search.
        workload: the workload that ``latency_ms`` means.
        seed: of the random archs and the timing order.
        task_name: for the report.
    """

    space: SearchSpace
    supernet: Supernet
    task: Task
    table: LatencyTable
    objectives: Objectives
    workload: str
    seed: int
    task_name: str


def select_front(items: Sequence[Evaluated], size: int) -> list[Evaluated]:
    """Return at most `size` feasible, non-dominated candidates: extremes, then by hypervolume.

    Raises:
        UserError: when no candidate is feasible; says the best that was reached.
    """
    feasible = [item for item in items if item.feasible]
    if not feasible:
        best = min((item.values[0] for item in items), default=float("nan"))
        raise UserError(
            f"none of {len(items)} evaluated archs keeps every constraint; the best first "
            f"objective that was reached is {best:.4g}; loosen the constraint or search longer"
        )
    values = np.array([item.values for item in feasible], dtype=np.float64)
    rows = np.flatnonzero(non_dominated(values))
    scaled = normalise(values[rows], values[rows].min(axis=0), values[rows].max(axis=0))
    chosen = list(dict.fromkeys(int(i) for i in scaled.argmin(axis=0)))[:size]
    rest = [i for i in range(len(rows)) if i not in chosen]
    reference = np.full(values.shape[1], 1.1)
    picked = greedy_hypervolume_subset(scaled[chosen], scaled[rest], reference, size - len(chosen))
    return [feasible[rows[i]] for i in [*chosen, *(rest[p] for p in picked)]]


def uniform_networks(space: SearchSpace) -> dict[str, Arch]:
    """Return the networks a person would try first, by name: one layer repeated, several sizes.

    The layer has softmax attention, or the first mixer of a space without it. Every width at full,
    half and the least depth; all heads, rotary positions and fp32 where the space has them, and
    the FFN width that is nearest to four times the model width.
    """
    mixers = [name for name in space.mixers if name != ABSENT] or [ABSENT]
    mixer = "softmax" if "softmax" in mixers else mixers[0]
    plain = {"position": "rope", "mixer_precision": "fp32", "ffn_precision": "fp32"}
    choices = {gene: value for gene, value in plain.items() if value in getattr(space, gene)}
    sizes = [size for size in space.intermediate_size if size or mixer != ABSENT]
    depths = {space.num_layers, max(space.num_layers // 2, space.min_depth), space.min_depth}
    networks: dict[str, Arch] = {}
    for d_model in space.d_model:
        size = min(sizes, key=lambda width: abs(width - 4 * d_model))
        for depth in sorted(depths, reverse=True):
            name = f"{mixer} d{d_model} L{depth}" if mixer != ABSENT else f"ffn d{d_model} L{depth}"
            networks[name] = space.uniform(
                d_model=d_model, depth=depth, mixer=mixer, intermediate_size=size, **choices
            )
    return networks


def random_archs(space: SearchSpace, codec: SpaceCodec, count: int, seed: int) -> list[Arch]:
    """Return `count` different random archs that keep the exact constraints."""
    rng = np.random.default_rng([seed, 11])
    found: dict[str, Arch] = {}
    for _ in range(200):
        rows = space.sample_genotypes(rng, 4 * count)
        for row in rows[(codec.constraints(rows) <= 0).all(axis=1)]:
            arch = space.decode(row)
            found.setdefault(arch.id, arch)
            if len(found) == count:
                return list(found.values())
    return list(found.values())


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
    qualities = _test_qualities(sources, archs, config.test_tokens, folder, reporter)
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


def _test_qualities(
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


def objective_values(record: Mapping[str, Any], names: Sequence[str], workload: str) -> list[float]:
    """Return a record's measured objectives."""
    latency = record["measured"]["latency_ms"]
    by_phase = {f"{name.partition('_')[0]}_ms": value for name, value in reversed(latency.items())}
    values = {
        "loss": record["measured"]["loss"],
        "latency_ms": latency[workload],
        "weight_bytes": record["weight_bytes"],
        "params": record["params"],
        **by_phase,
    }
    return [float(values[name]) for name in names]


def compare(sources: FrontSources, groups: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Add hypervolumes, chosen networks and prediction errors to the measured records."""
    names, workload = sources.objectives.names, sources.workload
    points = {
        group: np.array([objective_values(r, names, workload) for r in records])
        for group, records in groups.items()
    }
    groups["front"] = [
        record
        for record, keep in zip(groups["front"], non_dominated(points["front"]), strict=True)
        if keep
    ]
    every = np.vstack([values for values in points.values() if len(values)])
    ideal, nadir = every.min(axis=0), every.max(axis=0)
    reference = np.full(len(names), 1.1)
    volumes = {
        group: float(hypervolume(normalise(values, ideal, nadir), reference))
        if len(values)
        else 0.0
        for group, values in points.items()
    }
    return {
        "task": sources.task_name,
        "unit": sources.task.unit,
        "metric": sources.task.metric_name,
        "space": sources.space.name,
        "space_size": str(sources.space.size()),
        "objectives": list(names),
        "workload": workload,
        "workloads": [item.name for item in sources.table.workloads],
        "baselines": sources.task.baselines,
        "accuracy_baselines": _accuracy_baselines(sources.task),
        "groups": groups,
        "hypervolume": {
            **volumes,
            "reference": reference.tolist(),
            "ideal": ideal.tolist(),
            "nadir": nadir.tolist(),
        },
        "chosen": choose(groups["front"], names, workload),
        "latency_error": _latency_error(groups, [w.name for w in sources.table.workloads]),
        "device": sources.table.device.to_dict(),
        "versions": versions(),
    }


def _accuracy_baselines(task: Task) -> dict[str, float]:
    """Return the test accuracy that is reached without a network, by name."""
    if isinstance(task, LabelledTask):
        return {"commonest class": task.majority_accuracy}
    return {}


def choose(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], workload: str
) -> dict[str, str]:
    """Return the arch ids of the best, fastest, smallest and knee networks of a front."""

    def lowest(key: Callable[[Mapping[str, Any]], float]) -> str:
        return str(min(records, key=key)["arch_id"])

    values = np.array([objective_values(r, names, workload) for r in records])
    two = values[:, :2] if values.shape[1] > 1 else values
    return {
        "best": lowest(lambda r: float(r["measured"]["loss"])),
        "fastest": lowest(lambda r: float(r["measured"]["latency_ms"][workload])),
        "smallest": lowest(lambda r: float(r["weight_bytes"])),
        "knee": str(records[knee_index(two)]["arch_id"]),
    }


def _latency_error(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], workloads: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return predicted against measured latency over all measured networks."""
    unique = {r["arch_id"]: r for records in groups.values() for r in records}
    errors: dict[str, dict[str, float]] = {}
    for name in workloads:
        measured = np.array([r["measured"]["latency_ms"][name] for r in unique.values()])
        predicted = np.array([r["predicted"]["latency_ms"][name] for r in unique.values()])
        errors[name] = {
            "mape_percent": float(100 * np.mean(np.abs(predicted / measured - 1))),
            "kendall_tau": float(kendalltau(predicted, measured).statistic),
            "num_networks": len(unique),
        }
    return errors


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    names = ("optuna", "pymoo", "scikit-learn", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in names},
    }


def write_front(folder: Path, front: Mapping[str, Any]) -> None:
    """Write `front.json` and `front.csv`; an accuracy that is not measured is an empty cell."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    workloads = front["workloads"]
    writer.writerow(
        ["arch_id", "group", "name"]
        + ["measured_loss_nats", "measured_accuracy", "search_loss_nats"]
        + [f"measured_{name}_ms" for name in workloads]
        + [f"predicted_{name}_ms" for name in workloads]
        + ["weight_bytes", "params", "peak_mib", "d_model", "depth"]
    )
    for group in GROUPS:
        for r in front["groups"].get(group, []):
            arch = Arch.from_dict(r["arch"])
            writer.writerow(
                [r["arch_id"], group, r["name"] or ""]
                + [r["measured"]["loss"], r["measured"].get("accuracy"), r["search_loss"]]
                + [r["measured"]["latency_ms"][name] for name in workloads]
                + [r["predicted"]["latency_ms"][name] for name in workloads]
                + [r["weight_bytes"], r["params"], r["measured"]["peak_mib"]]
                + [arch.d_model, arch.depth]
            )
    write_text(folder / "front.csv", text.getvalue())
    write_json(folder / "front.json", front)
