"""Options of `nas export` and `nas run` about what is handed over, and in which formats."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXPORT_STAGES = ("run", "export")


def add_export_options(stage: argparse.ArgumentParser) -> None:
    """Add what an export can be told on the command line; each stands for a key of the config."""
    add = stage.add_argument_group("export").add_argument
    add(
        "--choose",
        metavar="A,B",
        help="which subnetworks: best, fastest, smallest, knee, arch ids, or all of the front",
    )
    add(
        "--formats",
        metavar="A,B",
        help="how they are written; --list-formats names them",
    )
    add(
        "--padded",
        action="store_true",
        help="also as a plain Llama folder, where the network allows it: the same function, padded "
        "with zeros, so not its speed",
    )
    add(
        "--recover",
        type=int,
        metavar="STEPS",
        help="train each chosen subnetwork on alone for so many steps first",
    )
    add("--list-formats", action="store_true", help="name the formats, and stop")


def export_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config values, as `load_config` takes them, that the options stand for."""
    if getattr(options, "stage", None) not in EXPORT_STAGES:
        return {}
    formats = None if options.formats is None else options.formats.split(",")
    if options.padded:
        from nas.config import ExportConfig

        formats = [*(ExportConfig.formats if formats is None else formats), "padded"]
    return {
        "export__choose": None if options.choose is None else options.choose.split(","),
        "export__formats": formats,
        "export__recover_steps": options.recover,
    }


def list_formats(as_json: bool) -> int:
    """Print every format, what it is, and which packages it lacks here."""
    from nas.export import EXPORTERS

    exporters = [kind() for kind in EXPORTERS.values()]
    if as_json:
        facts = {e.name: {"summary": e.summary, "missing": e.missing()} for e in exporters}
        print(json.dumps(facts))
        return 0
    width = max(len(exporter.name) for exporter in exporters)
    for exporter in exporters:
        lacks = f" ({exporter.missing()})" if exporter.missing() else ""
        print(f"{exporter.name:<{width}}  {exporter.summary}{lacks}")
    return 0
