"""A cluster of local processes for the tests, with token authentication and no leftovers."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORE_BYTES = 150 << 20


def environment() -> dict[str, str]:
    """What the processes of a test's cluster and its drivers are started with."""
    return {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@contextlib.contextmanager
def ray_environment() -> Iterator[None]:
    """Have Ray's files in a folder of their own, which is gone afterwards, and a token."""
    before = dict(os.environ)
    # A socket's path has at most 107 characters, which a folder of pytest's would exceed.
    with tempfile.TemporaryDirectory(prefix="hwnas", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        os.environ.update(environment(), RAY_TMPDIR=folder)
        from ray._private.authentication_test_utils import reset_auth_token_state

        try:
            # Ray reads mode and token once; this lets it look again.
            reset_auth_token_state()
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
            reset_auth_token_state()


@contextlib.contextmanager
def local_cluster(nodes: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Yield a `ray.cluster_utils.Cluster` of nodes with the given resources, the head first."""
    with ray_environment():
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        try:
            for resources in nodes:
                cluster.add_node(
                    object_store_memory=STORE_BYTES, include_dashboard=False, **resources
                )
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
