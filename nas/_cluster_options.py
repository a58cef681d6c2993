"""The options of `nas cluster`."""

from __future__ import annotations

import argparse
from typing import Any

from nas._described_command import add_described

SUMMARY = "run whole searches, or whole supernet trainings, as the trials of a Ray Tune job"
DETAILS = """\
JOB.toml says from which run (run), what is tried and where results go:

  name = "front"                   # of the experiment in the storage
  run = "runs/quickstart"          # a run folder, or a config file of which one is made first
  out = "runs/front"               # the merged run folder
  storage = "/shared/ray"          # absolute and shared by all nodes, or s3://bucket/folder

  [search]                         # one search for each combination
  samplers = ["predictor", "nsga2"]
  seeds = [0, 1, 2]
  evaluations = [200]
  devices = ["runs/laptop", "runs/server"]

  [training]                       # or, in place of [search], one training for each
  num_workers = 4                  # processes that train one supernet together
  num_samples = 8                  # drawn; without it every combination of the lists
  hyperparameters = { matrix_lr = { low = 0.005, high = 0.05, log = true }, num_random = [1, 2] }

further keys: cpus, gpus (of a trial or worker), max_concurrent, max_failures, checkpoint_s
"""


def add_cluster_command(commands: Any) -> None:
    """Add `nas cluster` to a parser's commands."""
    parser = add_described(commands, "cluster", SUMMARY, DETAILS)
    add = parser.add_argument
    add("job", metavar="JOB.toml", help="what is run, see below")
    add(
        "--ray",
        metavar="ADDRESS",
        help="HOST:PORT of the cluster's head, or auto on one of its nodes (default: the cluster "
        "in RAY_ADDRESS, or else a Ray that is started here)",
    )
    add("--resume", action="store_true", help="go on with the experiment of this name")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(command=_cluster)


def _cluster(options: argparse.Namespace) -> int:
    from nas.cluster_command import cluster_command

    return cluster_command(options)
