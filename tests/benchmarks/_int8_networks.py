"""The networks that a search has evaluated, rounded to int8 throughout."""

from __future__ import annotations

import dataclasses

import numpy as np

from hw_profiles.latency_table import LatencyTable
from nas.calibration import calibrated_view
from nas.candidates import Prices
from nas.evaluation import evaluation_amount, held_out_loss
from nas.pipeline import Pipeline
from nas.study import read_evaluated
from searchspace.arch import Arch


def in_int8(arch: Arch) -> Arch:
    """Return an arch with int8 weights and activations in every layer."""
    layers = tuple(
        layer
        if layer.skip
        else dataclasses.replace(layer, mixer_precision="int8", ffn_precision="int8")
        for layer in arch.layers
    )
    return dataclasses.replace(arch, layers=layers)


def int8_finalists(
    pipeline: Pipeline, baseline: Arch, faster: float, pool: int, count: int
) -> list[Arch]:
    """Return the int8 networks with the lowest validation losses that promise to be fast.

    Args:
        pipeline: of a finished run.
        baseline: in fp32.
        faster: by which the latency table says that they are faster than the baseline.
        pool: how many are evaluated, those first that are best as they were searched.
        count: how many are returned.
    """
    items = sorted(read_evaluated(pipeline.storage, ["loss"]), key=lambda item: item.values[0])
    archs = list({arch.id: arch for arch in (in_int8(item.arch) for item in items)}.values())
    # Read without a look at the device: it only says which ones are worth timing.
    table = LatencyTable.load(pipeline.folder.table)
    prices = Prices(pipeline.space, table, pipeline.workload)
    rows = np.stack([pipeline.space.encode(arch) for arch in [baseline, *archs]])
    base_ms, *latencies_ms = prices.of("latency_ms", rows)
    fast = [arch for arch, ms in zip(archs, latencies_ms, strict=True) if ms * faster <= base_ms]
    supernet, task = pipeline.supernet, pipeline.task
    amount = evaluation_amount(task, pipeline.config.search.evaluation_tokens)
    batches = task.evaluation_batches("validation", amount, 8)
    losses = {
        arch: held_out_loss(calibrated_view(supernet, arch, task), batches, task)
        for arch in fast[:pool]
    }
    return sorted(losses, key=lambda arch: losses[arch])[:count]
