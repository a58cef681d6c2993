"""The recipes: packaged, valid for Ray and for `nas`, and with token authentication on."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nas.cli import build_parser
from nas.cluster.job_config import load_job
from nas.cluster.job_trials import trials_of

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "nas" / "cluster" / "recipes"
TEXTS = {path.name: path.read_text() for path in sorted(RECIPES.iterdir())}


def test_every_recipe_is_packaged_and_named_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["nas"]
    readme = (ROOT / "README.md").read_text()
    assert set(TEXTS) == {
        "cluster.yaml", "job_submit.sh", "search.toml", "slurm.sh", "training.toml",
    }  # fmt: skip
    for name in TEXTS:
        assert any(fnmatch.fnmatch(f"cluster/recipes/{name}", glob) for glob in globs)
        assert name in readme


def test_the_job_files_are_valid() -> None:
    search, training = (load_job(RECIPES / f"{kind}.toml") for kind in ("search", "training"))
    assert len(trials_of(search)) == 12
    trials = trials_of(training)
    assert len(trials) == 6 and training.training is not None
    assert all(0.005 <= trial.changes["train.matrix_lr"] <= 0.05 for trial in trials)


def nas_commands(text: str) -> list[str]:
    return re.findall(r"nas cluster [^\n']*", text)


@pytest.mark.parametrize("name", TEXTS)
def test_every_nas_command_is_understood(name: str) -> None:
    for command in nas_commands(TEXTS[name]):
        words = shlex.split(command.replace('"$@"', "job.toml --resume"), comments=True)[1:]
        assert callable(build_parser().parse_args(words).command), command


def ray_commands(text: str) -> list[list[str]]:
    """Return the words of every ray command: subcommand and options, of comments too."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?<![\w/.-])ray ((?:job )?[a-z-]+)((?: -[^#]*)?)", line) for line in lines]
    return [[*m[1].split(), *re.findall(r"--[a-z-]+", m[2].split(" -- ")[0])] for m in found if m]


def test_every_ray_command_and_option_exists() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    commands = [words for text in TEXTS.values() for words in ray_commands(text)]
    names = {" ".join(word for word in words if word[0] != "-") for words in commands}
    assert names >= {"symmetric-run", "get-auth-token", "start", "stop", "up", "down", "exec",
                     "job submit", "job status"}  # fmt: skip
    for words in commands:
        command: Any = scripts.cli
        while words and words[0][0] != "-":
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        if command.name == "symmetric-run":
            known |= {o for p in scripts.cli.commands["start"].params for o in p.opts}
        assert set(words) <= known, (command.name, words)


def test_the_cluster_file_is_valid_for_ray_and_uses_the_token() -> None:
    yaml = pytest.importorskip("yaml")
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load(TEXTS["cluster.yaml"])
    util.validate_config(util.prepare_config(config))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert len(starts) == 4 and all(line.startswith("RAY_AUTH_MODE=token ray ") for line in starts)


FAKE = """#!/bin/bash
if [ "$2" = hostnames ]; then echo node7; echo node8; exit; fi
echo "$(basename "$0")" "$RAY_AUTH_MODE" "$@" >> "$LOG"
if [ "$(basename "$0")" = srun ]; then
    while [[ "$1" == --* ]]; do shift; done
    exec "$@"
fi
"""


def run_script(name: str, folder: Path, **environment: str) -> list[str]:
    """Run a script with commands that only write down how they were called."""
    for command in ("scontrol", "srun", "ray", "nas"):
        (folder / command).write_text(FAKE)
        (folder / command).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log")}
    done = subprocess.run(
        ["bash", str(RECIPES / name), "/shared/job.toml", "--resume"],
        env={**os.environ, **variables, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().splitlines()


def test_slurm_starts_one_cluster_on_all_nodes_and_runs_the_job_on_it(tmp_path: Path) -> None:
    calls = run_script("slurm.sh", tmp_path, SLURM_JOB_NODELIST="node[7-8]",
                       SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="16")  # fmt: skip
    assert calls[0] == "ray token get-auth-token --generate"
    assert calls[-1] == (
        "ray token symmetric-run --address node7:6379 --min-nodes 2 --num-cpus 16 -- "
        "nas cluster /shared/job.toml --resume --ray auto"
    )


def test_a_job_is_submitted_with_the_token(tmp_path: Path) -> None:
    calls = run_script("job_submit.sh", tmp_path, RAY_API_SERVER_ADDRESS="http://head:8265")
    assert calls == [
        "ray token job submit --no-wait --entrypoint-num-cpus 1 -- "
        "nas cluster /shared/job.toml --resume --ray auto"
    ]
    without = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
    done = subprocess.run(["bash", str(RECIPES / "job_submit.sh"), "job.toml"], env=without,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0 and "address of the dashboard" in done.stderr


def test_the_help_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys\nfrom nas.cli import main\n"
        "try: main(['cluster', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'optuna') if name in sys.modules])"
    )
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]" and "hyperparameters" in done.stdout
