"""Devices on a real cluster: alone on one, and a search for two of them by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nas.cluster.connection import connect
from nas.cluster.devices import alone_on
from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.study import evaluated, sqlite_url, studies_at
from searchspace.errors import UserError
from tests.cluster.local_cluster import local_cluster

pytestmark = pytest.mark.cluster
CONFIG = """
preset = "decoder-tiny"
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 64
[train]
num_steps = 2
batch_size = 2
[profile]
workloads = ["prefill_b1_t64"]
num_threads = 1
budget_s = 1.5
[search]
num_evaluations = 6
evaluation_tokens = 256
metrics = []
[export]
front_size = 2
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    device = {"num_cpus": 1, "resources": {"hw:one": 1, "hw_probe": 1}}
    other = {"num_cpus": 1, "resources": {"hw:two": 1, "hw_probe": 1}}
    with local_cluster([{"num_cpus": 0}, device, other]) as found:
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    source = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    (folder / "run.toml").write_text(CONFIG.format(data=str(source)))
    config = load_config(str(folder / "run.toml"), out=str(folder / "run"))
    Pipeline(config, Reporter(quiet=True)).train()
    return folder / "run"


def nas(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nas", *arguments], capture_output=True, text=True, env=os.environ
    )


def test_nothing_else_runs_on_a_device_that_is_measured(cluster: Any) -> None:
    import ray

    spans: list[tuple[str, float, float]] = []

    def hold(name: str) -> None:
        with alone_on("one", lambda text: None, 60.0):
            begin = time.monotonic()
            time.sleep(0.5)
            spans.append((name, begin, time.monotonic()))

    def task() -> tuple[str, float, float]:
        begin = time.monotonic()
        time.sleep(0.3)
        return "task", begin, time.monotonic()

    with connect(cluster.address):
        on_node = ray.remote(task).options(num_cpus=1, resources={"hw:one": 0.001})
        refs = [on_node.remote()]
        threads = [threading.Thread(target=hold, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        refs += [on_node.remote() for _ in range(2)]
        for thread in threads:
            thread.join()
        spans += ray.get(refs)
        said: list[str] = []
        with (
            alone_on("one", lambda text: None, 60.0),
            pytest.raises(UserError, match=r"device one .* did not become free in 1 s"),
            alone_on("one", said.append, 1.0),
        ):
            pass
        assert said[0].startswith("waiting until nothing else runs on device one")
    ordered = sorted(spans, key=lambda span: span[1])
    assert len(ordered) == 5
    assert all(a[2] <= b[1] for a, b in pairwise(ordered)), ordered


def test_one_search_for_two_devices(cluster: Any, trained: Path) -> None:
    done = nas("search", str(trained), "--ray", cluster.address, "--workers", "2",
               "--devices", "one,two", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "search", "something else is on stdout"
    (study,) = studies_at(sqlite_url(trained))
    items = evaluated(study)
    assert len(items) == 6
    tables = {name: json.loads((trained / "devices" / f"{name}.json").read_text())
              for name in ("one", "two")}  # fmt: skip
    assert all(table["entries"]["prefill_b1_t64"] for table in tables.values())
    fronts = json.loads((trained / "device_fronts.json").read_text())
    assert list(fronts["fronts"]) == ["worst"] and set(fronts["devices"]) == {"one", "two"}
    for record in fronts["fronts"]["worst"]:
        for device in ("one", "two"):
            assert record["measured"][device]["latency_ms"]["prefill_b1_t64"] > 0
            assert record["predicted"][device]["latency_ms"]["prefill_b1_t64"] > 0

    again = nas("search", str(trained), "--set", "ray.goal=each")
    assert again.returncode == 0, again.stderr
    assert "measuring its latency table" not in again.stderr
    fronts = json.loads((trained / "device_fronts.json").read_text())
    assert list(fronts["fronts"]) == ["one", "two"]
    assert fronts["objectives"] == ["loss", "latency_ms@one", "latency_ms@two", "weight_bytes"]

    export = nas("export", str(trained))
    assert export.returncode == 2 and "--set ray.devices=[]" in export.stderr
    missing = nas("search", str(trained), "--devices", "one,three")
    assert missing.returncode == 2 and "no node of the cluster offers hw:three" in missing.stderr
    assert "hw:one: 1" in missing.stderr
