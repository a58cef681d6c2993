"""The README's commands: each is understood, and each is run (the long ones in a small form)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nas._profile_options import join_command
from nas.cli import build_parser
from nas.config import ExperimentConfig
from tests.public_data import write_public_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shell_commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [part for part in parts if part]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": paths})  # fmt: skip


@pytest.mark.parametrize("text", [c for c in shell_commands() if c.startswith("nas ")])
def test_every_nas_command_is_understood(text: str) -> None:
    arguments = shlex.split(re.sub(r"<[^>]*>", "ID", text))[1:]
    assert callable(build_parser().parse_args(join_command(arguments)).command)


def test_the_first_screen_holds_both_commands() -> None:
    first = README[:1500]
    assert "pip install . && nas run" in first
    assert "pip install '.[test]' && pytest -q" in first


def test_the_config_example_is_valid() -> None:
    (example,) = blocks("toml")
    config = ExperimentConfig.from_dict(tomllib.loads(example))
    assert config.search.constraints == ("decode_ms<=1.5", "weight_bytes<=4e6")


def test_the_sampler_example_runs() -> None:
    (code,) = (block for block in blocks("python") if "PredictorGuidedSampler" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    best = names["study"].best_trials
    assert len(names["study"].trials) == 30 and len(best) > 8


def test_doctor_says_what_the_machine_has() -> None:
    done = run("nas", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert run("nas", "doctor").stdout.strip()


ADD_AND_CHECK = """
import re
from pathlib import Path
import searchspace
root = Path(searchspace.__file__).parent
code, name, cls = Path("new_operator.py").read_text(), "moving_average", "MovingAverage"
(root / "mixers" / f"{name}.py").write_text(code)
registry = root / "mixers" / "__init__.py"
text = registry.read_text()
line = f"from searchspace.mixers.{name} import {cls}\\n\\n"
text = text.replace("MIXERS: dict", line + "MIXERS: dict")
text = re.sub(r"(MIXERS: [^{]*\\{)", rf'\\1\\n    "{name}": {cls},', text)
registry.write_text(text)
import torch
from searchspace.space import SearchSpace
from searchspace.supernet import Supernet
from searchspace.testing import check_operator
print(len(check_operator(name)))
space = SearchSpace("one", 11, (16,), 8, 2, {name: {}, "softmax": {}}, ((2, 2), (1, 1)), (16, 8))
supernet = Supernet(space, torch.Generator().manual_seed(0))
supernet.start_step()
loss = supernet.view(space.largest(), train=True)(torch.zeros(1, 5).long()).square().mean()
loss.backward()
assert supernet.view(space.largest(), train=True).blocks["layer0_mixer"].op.average_decay.grad.any()
"""


def test_adding_an_operator_takes_one_file_and_one_line(tmp_path: Path) -> None:
    (code,) = (block for block in blocks("python") if "class MovingAverage" in block)
    assert '"moving_average": MovingAverage,' in README
    for package in ("searchspace", "kernels/nas_kernels"):
        shutil.copytree(ROOT / package, tmp_path / Path(package).name)
    (tmp_path / "new_operator.py").write_text(code)
    done = subprocess.run([sys.executable, "-c", ADD_AND_CHECK], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


BENCHMARKS = {
    "supernet_throughput": ["--preset", "decoder-tiny", "--rounds", "2", "--random", "1"],
    "latency_model": ["--presets", "decoder-tiny", "--backends", "eager", "--threads", "1",
                      "--budget-s", "10", "--num", "5", "--rounds", "3"],
    "transfer": ["--preset", "decoder-tiny", "--from-threads", "1", "--to-threads", "1",
                 "--num", "3", "--test-archs", "5", "--budget-s", "8", "--networks-s", "8"],
    "memory": ["--num", "1", "--presets", "decoder-small"],
    "hwgpt_search": ["--problem", "layered", "--evals", "20", "--seeds", "1", "--samplers",
                     "predictor", "nsga2+design", "uniform_grid"],
    "joint_bits": ["--train-s", "3", "--profile-s", "5", "--evals", "8", "--seeds", "1",
                   "--tokens", "512", "--threads", "1"],
    "assignment": ["--layers", "8", "--choices", "4", "--seeds", "1"],
    "scaling": ["--actors", "1", "--seconds", "0.1", "--evals", "3", "--calls", "5", "--simulated",
                "2", "--simulated-seconds", "1", "--simulated-evals", "4"],
    "million_candidates": ["--preset", "decoder-tiny", "--num", "5000", "--repeats", "1"],
    "mixers": ["--mixers", "softmax", "pool", "--parts", "latency", "copy", "--rounds", "2",
               "--probe-steps", "2"],
    "norms": ["--norms", "layernorm", "prepbn", "--rounds", "2", "--d-model", "32"],
    "precisions": ["--precisions", "fp32", "int8", "--rounds", "2", "--d-model", "32"],
    "matformer": ["--steps", "1", "--test-tokens", "512"],
    "ranking": ["--preset", "decoder-tiny", "--steps", "2", "--alone-steps", "1", "--num", "3"],
    "attention_transfer": ["--mixers", "gla", "--steps", "4", "--first-steps", "2",
                           "--transfer-steps", "1", "--seeds", "1"],
    "metric_cost": ["--families", "decoder", "--metrics", "params", "snip", "--layers", "1",
                    "--rounds", "1"],
    "nas_bench_bert": ["--metrics", "params", "--readings", "trained", "--seeds", "1",
                       "--splits", "1", "--sizes", "8"],
    "hat_latency": ["--sizes", "50"],
    "hwgpt_quality": ["--spaces", "s", "--sizes", "20", "--seeds", "1"],
    "deploy": ["--choose", "best", "--runtimes", "eager", "onnx", "--rounds", "3", "--budget-s",
               "2", "--pool", "4", "--tokens", "512", "--threads", "1"],
    "speculative": ["--texts", "1", "--rounds", "1", "--tokens", "12"],
    "kernels": ["--device", "cpu", "--quick"],
    "gpu": ["--device", "cpu", "--quick", "--parts", "kernels", "profile"],
    "training_throughput": ["--device", "cpu", "--preset", "decoder-tiny", "--modes", "off",
                            "--precisions", "fp32", "--batch-size", "2", "--tokens", "16",
                            "--vocab", "64", "--steps", "1", "--budget-s", "10"],
    "artefacts": ["--archs", "1", "--presets", "decoder-tiny", "--formats", "hf", "onnx"],
}  # fmt: skip
IN_FOLDER = {"mixers": "--data", "matformer": "--data", "ranking": "--out", "joint_bits": "--out",
             "kernels": "--out", "gpu": "--out", "artefacts": "--into"}  # fmt: skip
ON_A_RUN = ("deploy", "speculative")
ON_PUBLIC_DATA = ("nas_bench_bert", "hat_latency", "hwgpt_quality")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs") / "tiny")
    small = ["train.num_steps=4", "search.num_evaluations=6", "search.metrics=[]",
             "export.formats=['hf']", "profile.num_threads=1"]  # fmt: skip
    options = [word for text in small for word in ("--set", text)]
    preset = ["--preset", "decoder-tiny", "--budget", "1m"]
    done = run("nas", "run", *preset, "--out", folder, "--quiet", *options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_prints_a_table_or_json(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert f"python -m tests.benchmarks.{name}" in README
    folder = [IN_FOLDER[name], str(tmp_path / "data")] if name in IN_FOLDER else []
    if name in ON_A_RUN:
        folder = ["--run", request.getfixturevalue("finished_run")]
    if name in ON_PUBLIC_DATA:
        folder = ["--data", str(write_public_data(tmp_path))]
    done = run(f"tests.benchmarks.{name}", *BENCHMARKS[name], *folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_every_benchmark_is_listed_above() -> None:
    found = {p.stem for p in (ROOT / "tests" / "benchmarks").glob("[!_]*.py")}
    assert found == set(BENCHMARKS)
