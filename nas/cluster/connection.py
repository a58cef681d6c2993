"""The connection to a Ray cluster: one that runs, or one started for this command alone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from searchspace.errors import UserError

LOCAL, AUTO = "local", "auto"
HOW_TO = (
    "give HOST:PORT of its head as `ray start --head` prints it, auto for the cluster that this "
    "machine is a node of, or no address to start Ray here"
)
TOKEN_HOW_TO = (
    "run `ray get-auth-token --generate` on one machine, put the same token into ~/.ray/auth_token "
    "(or RAY_AUTH_TOKEN) on every node and here, and set RAY_AUTH_MODE=token for all"
)
ANSWER_S = 5.0
LOCAL_STORE_BYTES = 512 << 20
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HTTP2_SETTINGS = 4
CHANGED = ("RAY_", "PYTHONPATH", "PYTHONBREAKPOINT")
"""How the environment variables begin that are set for Ray, or by it."""


def check_address(text: str) -> None:
    """Refuse what is no address of a cluster.

    Raises:
        UserError: saying what is one.
    """
    if text in ("", LOCAL, AUTO):
        return
    if text.startswith("ray://"):
        raise UserError(
            f"the Ray address {text!r} is of the Ray client, which the search does not use; run "
            "this command on a node of the cluster with --ray auto, or by `ray job submit`"
        )
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"{text!r} is no Ray address; {HOW_TO} (CONFIG goes before --ray)")


def resolved(address: str | None) -> str:
    """Return ``"local"``, ``"auto"`` or ``HOST:PORT``.

    Without an address RAY_ADDRESS counts, which `ray job submit` sets for its jobs.
    """
    if not address or address == LOCAL:
        address = os.environ.get("RAY_ADDRESS", "") or LOCAL
    check_address(address)
    return address


@contextlib.contextmanager
def connect(address: str | None = None, **options: Any) -> Iterator[None]:
    """Have a connection to Ray while the block runs; what was started for it is stopped after it.

    A connection that exists is used as it is, and stays.

    Args:
        address: ``HOST:PORT`` of a cluster's head, ``"auto"`` for the cluster that this machine
            is a node of, None (or ``"local"``) for the one in RAY_ADDRESS, or else for a Ray that
            is started on this machine for this block.
        options: of `ray.init`. Those about resources count only for a Ray that is started here.

    Raises:
        UserError: when Ray is not installed, nothing answers at the address, versions differ, or
            the token is wrong.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    where = resolved(address)
    if where not in (LOCAL, AUTO):
        _require_answer(where)
    with _kept_as_it_was():
        try:
            _start(ray, where, options)
            yield
        finally:
            # Also after a failure half-way: nothing that was started may stay.
            ray.shutdown()


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed here; pip install 'ray[tune]'") from None
    return ray


def _start(ray: ModuleType, where: str, options: dict[str, Any]) -> None:
    common = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "hwnas"}
    if where == LOCAL:
        # Started processes get this process's modules, wherever they were imported from.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        common |= {"include_dashboard": False, "object_store_memory": LOCAL_STORE_BYTES}
    else:
        local_only = ("num_cpus", "num_gpus", "resources", "object_store_memory")
        options = {key: value for key, value in options.items() if key not in local_only}
    try:
        ray.init(address=where, **{**common, **options})
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _explained(ray, where, error) from error


def _explained(ray: ModuleType, where: str, error: Exception) -> UserError:
    text = str(error).strip()
    if "Version mismatch" in text:
        facts = " ".join(text.split()).removeprefix("Version mismatch: ")
        return UserError(
            f"this process and the Ray cluster at {where} have different versions ({facts}); "
            "install the same Python and Ray on all nodes"
        )
    if isinstance(error, ray.exceptions.AuthenticationError):
        return UserError(f"the Ray cluster at {where} refuses the token; {TOKEN_HOW_TO}")
    if where not in (AUTO, LOCAL) and "Failed to connect" in text:
        # The address answered before, so it is there; Ray logs why it is refused, but does not say.
        return UserError(
            f"the Ray cluster at {where} answers and lets nobody in, as it does with a wrong or "
            f"missing token; {TOKEN_HOW_TO}"
        )
    if where == AUTO:
        return UserError(f"no Ray cluster runs on this machine; {HOW_TO}")
    first = (text or type(error).__name__).splitlines()[0]
    if where == LOCAL:
        return UserError(f"Ray does not start on this machine: {first}")
    return UserError(f"cannot connect to the Ray cluster at {where}: {first}; {HOW_TO}")


def _require_answer(where: str) -> None:
    """Ask whether a Ray server is there: `ray.init` would wait for it without end.

    Raises:
        UserError: when nothing answers, or what answers is no Ray.
    """
    host, _, port = where.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as stream:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                _require_http2(stream, where)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"no Ray cluster answers at {where} ({reason}); {HOW_TO}") from None


def _require_http2(stream: socket.socket, where: str) -> None:
    """Ray's head speaks gRPC, whose server begins with an HTTP/2 frame of settings."""
    stream.sendall(HTTP2_HELLO)
    head = b""
    while len(head) < 4 and (part := stream.recv(4 - len(head))):
        head += part
    if len(head) < 4 or head[3] != HTTP2_SETTINGS:
        raise UserError(f"what answers at {where} is no Ray cluster; {HOW_TO}")


@contextlib.contextmanager
def _kept_as_it_was() -> Iterator[None]:
    """Undo what `ray.init` changes in this process: variables and the answer to SIGTERM."""
    before = {name: value for name, value in os.environ.items() if name.startswith(CHANGED)}
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        for name in [name for name in os.environ if name.startswith(CHANGED)]:
            if name not in before:
                del os.environ[name]
        os.environ.update(before)
