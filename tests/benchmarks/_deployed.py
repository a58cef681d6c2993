"""Networks in several runtimes: what `tests.benchmarks.deploy` compares.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from hw_profiles.backends import get_backend
from hw_profiles.backends.base import Call
from hw_profiles.timing import Sentinel, time_interleaved
from hw_profiles.workload import Workload
from nas.evaluation import held_out_loss
from nas.export import Handover
from nas.export.base import Exporter, Loaded
from nas.tasks.base import Task
from searchspace.arch import Arch
from searchspace.subnet import Subnet

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Network:
    """One network of the comparison.

    Args:
        arch: what it is.
        subnet: packed.
        loaded: artefacts in use, by format.
        folders: where they lie.
    """

    arch: Arch
    subnet: Subnet
    loaded: dict[str, Loaded]
    folders: dict[str, Path]


def deployed(
    subnet: Subnet, task: Task, exporters: Sequence[Exporter], folder: Path
) -> tuple[Network, dict[str, str]]:
    """Write and load a network's artefacts; returns the reasons for those that there are not.

    Args:
        subnet: packed.
        task: that it was trained on.
        exporters: of the formats that are wanted.
        folder: gets a folder per artefact.
    """
    facts = {"unit": task.unit, "vocab_size": task.vocab_size, "seq_len": task.seq_len}
    handover = Handover(subnet, facts)
    network, refused = Network(subnet.arch, subnet, {}, {}), {}
    for exporter in exporters:
        if reason := exporter.missing() or exporter.refusal(handover):
            refused[exporter.name] = reason
            continue
        place = Path(tempfile.mkdtemp(prefix=f"{subnet.arch.id}-{exporter.name}-", dir=folder))
        exporter.write(handover, place)
        network.loaded[exporter.name] = exporter.load(place)
        network.folders[exporter.name] = place
    return network, refused


def artefact_loss(network: Network, runtime: str, batches: Batches, task: Task) -> float:
    """Return the loss on held-out data, as the artefact computes it."""
    if runtime not in network.loaded:
        return held_out_loss(network.subnet, batches, task)
    total = 0.0
    for inputs, targets in batches:
        logits = network.loaded[runtime].logits(inputs).flatten(0, -2)
        total += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
    return total / sum(task.units_of(targets) for _, targets in batches)


def call_of(network: Network, runtime: str, prompt_BT: Tensor, workload: Workload) -> Call:
    """Return one run of a workload, by an artefact or a backend of that name."""
    if runtime not in network.loaded:
        inputs = prompt_BT if workload.phase == "prefill" else prompt_BT[:, :1]
        return get_backend(runtime).prepare(network.subnet, inputs, workload)
    loaded = network.loaded[runtime]
    if workload.phase == "prefill":
        return lambda: loaded.logits(prompt_BT)
    return _decode_call(loaded, prompt_BT)


def interleaved_ms(
    calls: Mapping[str, Call], rounds: int, budget_s: float, sentinel_us: float
) -> dict[str, float]:
    """Return the milliseconds of calls that are timed in turns.

    Args:
        calls: by name.
        rounds: how often each is timed at most.
        budget_s: seconds for all of them.
        sentinel_us: of the sentinel at the speed that latencies are given at.
    """
    eager = get_backend("eager")
    with eager.clock() as clock:
        timings = time_interleaved(
            calls,
            rounds=rounds,
            rng=random.Random(0),
            sentinel=Sentinel(eager.sentinel(), sentinel_us),
            time_budget_s=budget_s,
            min_sample_ms=2.5,
            clock=clock,
        )
    return {key: timing.latency_us / 1e3 for key, timing in timings.items()}


def _decode_call(loaded: Loaded, prompt_BT: Tensor) -> Call:
    """Return one step behind a prompt; now and then it starts again, before steps get longer."""
    tokens = prompt_BT.shape[1]
    most = max(8, tokens // 8)
    token_B1 = prompt_BT[:, :1]
    session, steps = loaded.session(1, tokens + most + 1), 0
    session(prompt_BT)

    def call() -> Tensor:
        nonlocal session, steps
        if steps == most:
            session, steps = loaded.session(1, tokens + most + 1), 0
            session(prompt_BT)
        steps += 1
        return session(token_B1)

    return call


def size_of(network: Network, runtime: str) -> int:
    """Return the bytes of an artefact's files; of PyTorch's networks, of the weights."""
    if runtime not in network.folders:
        return network.subnet.weight_bytes()
    return sum(p.stat().st_size for p in network.folders[runtime].rglob("*") if p.is_file())
