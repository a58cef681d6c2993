"""A small world for the tests of the pipeline's parts: space, table, task, supernet."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from hw_profiles.device import Device
from hw_profiles.latency_table import Entry, LatencyTable
from hw_profiles.workload import Workload
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.language_model import LanguageModelTask
from searchspace.cost import num_params
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet

WORKLOADS = ("prefill_b1_t64", "decode_b1_t64")


def synthetic_table(space: SearchSpace) -> LatencyTable:
    """A table in which a sub-block takes 10 us and 1 ns per parameter."""
    workloads = tuple(Workload.parse(name) for name in WORKLOADS)
    table = LatencyTable(Device.current(), workloads, sentinel_us=1000.0)
    for spec in space.sub_blocks():
        us = 10.0 + num_params(spec) / 1e3
        for workload in workloads:
            table.entries[workload.name, spec.key] = Entry(
                us / 1e3, us, 0.0, 9, 1.0, True, "Synthetic", "2026-01-01T00:00:00+00:00"
            )
    return table


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "bdb", "calendar", "cgi", "codecs", "copy", "csv", "datetime")
    sources = (stdlib / f"{name}.py" for name in names)
    path.write_text("\n".join(s.read_text("utf-8") for s in sources if s.exists()), "utf-8")
    return path


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> LanguageModelTask:
    config = TaskConfig("text", str(text_file), vocab_size=384, seq_len=64)
    return prepare_task(config, tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def space(task: LanguageModelTask) -> SearchSpace:
    return SearchSpace.load("decoder-tiny", task.vocab_size)


@pytest.fixture(scope="session")
def table(space: SearchSpace) -> LatencyTable:
    return synthetic_table(space)


@pytest.fixture
def supernet(space: SearchSpace) -> Supernet:
    return Supernet(space, torch.Generator().manual_seed(0))
