"""A base run for the tests of jobs: a task, a barely trained supernet and a made-up table."""

from __future__ import annotations

from pathlib import Path

from nas.config import load_config
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.training.state import read_state
from tests.nas.conftest import synthetic_table

CONFIG = """
preset = "decoder-tiny"
[task]
name = "text"
data = {data!r}
vocab_size = 384
seq_len = 32
[train]
num_steps = 8
precision = "fp32"
batch_size = 2
[profile]
workloads = ["prefill_b1_t64", "decode_b1_t64"]
num_threads = 1
[search]
workload = "prefill_b1_t64"
num_evaluations = 4
evaluation_tokens = 64
metrics = []
"""


def make_base(folder: Path) -> Path:
    """Make a run folder inside a folder; return it."""
    words = ["import", "def", "return", "class", "self", "value", "number", "letter"]
    lines = (f"{words[i % 8]} {words[i * i % 7]}_{i * 7919 % 1000} = {i}" for i in range(9000))
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "run.toml").write_text(CONFIG.format(data=str(folder / "text.txt")))
    config = load_config(str(folder / "run.toml"), out=str(folder / "base"))
    pipeline = Pipeline(config, Reporter(quiet=True))
    pipeline.train()
    state = read_state(folder / "base" / "supernet")
    assert state is not None and state.done
    synthetic_table(pipeline.space).save(folder / "base" / "latency_table.json", keep_others=False)
    return folder / "base"
