"""The verifying process, seen from the one that writes; see `nas.export.check`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hw_profiles.process import child_environment
from nas.export.base import Exporter, ExportFailed

LAST_LINES = 4


class Checker:
    """A fresh process that loads artefacts, started at the first use; use it in a `with` block.

    Its temporary files lie in a folder that this side removes, as a process that is killed cannot.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `__exit__`
        self._scratch = tempfile.TemporaryDirectory(prefix="hwnas-", ignore_cleanup_errors=True)

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
        self._log.close()
        self._scratch.cleanup()

    def check(self, exporter: Exporter, folder: Path, reference: Path) -> dict[str, Any]:
        """Return what the artefact in `folder` computes; see `nas.export.check.check`.

        Raises:
            ExportFailed: when it cannot be loaded or run.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        request = {
            "format": exporter.name,
            "folder": str(folder.resolve()),
            "reference": str(reference.resolve()),
        }
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ExportFailed(
                f"the process that loads {exporter.name} ended: {self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ExportFailed(f"{exporter.name} does not run when loaded: {answer['error']}")
        found: dict[str, Any] = answer["found"]
        return found

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nas.export.check", str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**child_environment(), "TMPDIR": self._scratch.name},
            )
        return self._process

    def _last_words(self) -> str:
        """Return the end of what the process printed."""
        if self._process is not None:
            self._process.wait()
        self._log.seek(0)
        return " / ".join(self._log.read().strip().splitlines()[-LAST_LINES:])
