"""Scores that a run folder keeps: one line per figure, appended as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from searchspace.errors import UserError

FILE = "assignment_scores.jsonl"


class ScoreFile:
    """Figures by name, for one set of weights and one set of held-out tokens.

    A line is written by one call, so a killed process leaves whole lines, or at worst a torn last
    one, which is passed over. Lines of other weights stay where they are.

    Args:
        path: the file; None keeps nothing.
        key: of weights and tokens.

    Raises:
        UserError: when the file cannot be read.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        """Return the number of figures."""
        return len(self._known)

    def __contains__(self, name: str) -> bool:
        """Whether a figure is known."""
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        """Return a figure."""
        return self._known[name]

    def put(self, name: str, value: Any) -> None:
        """Keep a figure.

        Raises:
            UserError: when the file cannot be written.
        """
        self._known[name] = value
        if self._path is None:
            return
        line = json.dumps({"key": self._key, "name": name, "value": value}) + "\n"
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; choose another folder or make room"
            ) from None

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        for line in text.splitlines():
            try:
                values = json.loads(line)
                if values["key"] == self._key:
                    self._known[values["name"]] = values["value"]
            except (json.JSONDecodeError, LookupError, TypeError):
                continue
        if text and not text.endswith("\n"):
            # The next line must not be glued to a torn one.
            with path.open("a", encoding="utf-8") as stream:
                stream.write("\n")


def weights_key(weights: Path, num_tokens: int) -> str:
    """Return a short key of a file of weights and an amount of held-out tokens.

    Raises:
        UserError: when the file cannot be read.
    """
    try:
        with weights.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights {weights}: {error.strerror}") from None
    return f"{digest[:12]}/{num_tokens}"
