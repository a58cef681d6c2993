"""The README's commands: each is understood, and each is run (the long ones in a small form)."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nas.cli import build_parser
from nas.config import ExperimentConfig

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
    assert callable(build_parser().parse_args(arguments).command)


def test_the_first_screen_holds_both_commands() -> None:
    first = README[:1500]
    assert "pip install . && nas run" in first
    assert "pip install '.[test]' && pytest -q" in first


def test_the_config_example_is_valid() -> None:
    (example,) = blocks("toml")
    config = ExperimentConfig.from_dict(tomllib.loads(example))
    assert config.search.constraints == ("decode_ms<=1.5", "weight_bytes<=4e6")


def test_doctor_says_what_the_machine_has() -> None:
    done = run("nas", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert run("nas", "doctor").stdout.strip()


BENCHMARKS = {
    "supernet_throughput": ["--preset", "decoder-tiny", "--rounds", "2", "--random", "1"],
    "latency_error": ["--preset", "decoder-tiny", "--budget-s", "10", "--num", "5"],
    "sampler_hypervolume": ["--evals", "20", "--seeds", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_prints_a_table_or_json(name: str) -> None:
    assert f"python -m tests.benchmarks.{name}" in README
    done = run(f"tests.benchmarks.{name}", *BENCHMARKS[name], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_every_benchmark_is_listed_above() -> None:
    found = {p.stem for p in (ROOT / "tests" / "benchmarks").glob("[!_]*.py")}
    assert found == set(BENCHMARKS)
