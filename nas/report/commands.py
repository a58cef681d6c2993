"""The commands that hand a network over, written so that they can be pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path


def export_command(folder: Path, arch_ids: Sequence[str]) -> str:
    """Return the command that exports networks of a run folder."""
    choice = f"export.choose={json.dumps(list(arch_ids))}"
    return shlex.join(["nas", "export", "--out", str(folder), "--set", choice])


def load_line(folder: Path, arch_id: str) -> str:
    """Return the Python line that loads an exported network."""
    return f"network = Subnet.load({str(folder / 'subnets' / arch_id)!r})"


def generate_command(folder: Path, arch_id: str) -> str:
    """Return the command that lets an exported network write text."""
    subnet = str(folder / "subnets" / arch_id)
    return shlex.join(["nas", "generate", subnet, "--prompt", "def "])
