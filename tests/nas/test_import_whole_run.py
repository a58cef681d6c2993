"""From a checkpoint to folders that transformers loads, by the commands a person would give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.export.huggingface.exporter import load_model, modules_cache
from nas.importing.checkpoint import read_checkpoint
from searchspace.cost import arch_cost, weight_bytes
from tests.nas.import_models import save_checkpoint, train_llama

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
TINY = {
    "task.seq_len": 64, "task.max_train_bytes": 200_000, "profile.num_threads": 1,
    "profile.budget_s": 5, "train.num_steps": 20, "train.precision": "fp32",
    "search.num_evaluations": 12, "search.evaluation_tokens": 1024, "search.metric_pool": 4,
    "search.population": 4, "export.front_size": 2, "export.test_tokens": 1024,
}  # fmt: skip
FEW = ("--ffn", "100,50", "--heads", "100,50", "--mixers", "none")


def nas(*arguments: object) -> dict[str, Any]:
    """Run a command in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "nas", *map(str, arguments), "--json", "--quiet"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def whole_run(checkpoint: Path, run: Path, *arguments: object, **changes: object) -> dict[str, Any]:
    """Bring a checkpoint in, let everything run, and check what does not depend on its kind.

    Returns:
        the records of the front.
    """
    values = {**TINY, **changes}
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    facts = nas("import", checkpoint, "--out", run, *arguments, *FEW, *settings)
    assert facts["difference"] < 1e-5
    nas("run", run)
    front = json.loads((run / "front.json").read_text())["groups"]["front"]
    original = arch_cost(read_checkpoint(checkpoint).recipe.arch, weight_bytes)
    assert min(record["weight_bytes"] for record in front) < 0.9 * original
    for record in front:
        folder = run / "subnets" / record["arch_id"]
        report = json.loads((folder / "export.json").read_text())
        assert set(report["formats"]) == {"hf", "onnx"}
        assert all("verified" in found for found in report["formats"].values())
        assert load_model(folder).subnet.arch.id == record["arch_id"]
    assert (run / "report.html").exists()
    return {record["arch_id"]: record for record in front}


def test_a_llama(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    train_llama(tmp_path / "llama", 60)
    run = tmp_path / "run"
    front = whole_run(tmp_path / "llama", run)
    given = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    for arch_id in front:
        folder = run / "subnets" / arch_id
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("def main(self):\n    π", return_tensors="pt")
        assert prompt["input_ids"].tolist() == [given("def main(self):\n    π")["input_ids"]]
        assert len(tokenizer) == 520 and tokenizer.eos_token == "<|endoftext|>"
        out = load_model(folder).generate(**prompt, max_new_tokens=5, min_new_tokens=5)
        assert out.shape[1] == prompt["input_ids"].shape[1] + 5


def test_a_bert_with_labelled_text(tmp_path: Path) -> None:
    names = {"0": "mail", "1": "code", "2": "news"}
    checkpoint = save_checkpoint("bert", tmp_path / "bert", id2label=names, num_labels=3)
    words, rng = ["alpha", "beta", "gamma", "delta", "epsilon"], np.random.default_rng(0)
    for name in names.values():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(30):
            text = f"{name} " * 3 + " ".join(rng.choice(words, 6))
            (tmp_path / "data" / name / f"{number}.txt").write_text(text)
    run = tmp_path / "run"
    front = whole_run(checkpoint, run, "--data", tmp_path / "data", **{"task.seq_len": 80})
    modules_cache()
    for arch_id in front:
        folder = str(run / "subnets" / arch_id)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("code", padding="max_length")["input_ids"][4:] == [3, *[0] * 75]
        model = load_model(Path(folder))
        assert model.config.id2label == {0: "code", 1: "mail", 2: "news"}
        pipe = transformers.pipeline("text-classification", model=folder, trust_remote_code=True)
        texts = ["news news news alpha", "code code code beta gamma"]
        said = pipe(texts, truncation=True)
        with torch.inference_mode():
            inputs = tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
            scores, classes = model.subnet(inputs).softmax(-1).max(-1)
        assert [s["label"] for s in said] == [model.config.id2label[int(c)] for c in classes]
        assert [s["score"] for s in said] == pytest.approx(scores.tolist(), rel=1e-4)
