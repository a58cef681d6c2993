"""The command line. Results go to stdout, logs and progress to stderr.

Nothing heavy is imported before a command runs, so `nas --help` is instant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas._assign_options import add_assign_command
from nas._cluster_options import add_cluster_command
from nas._described_command import add_described
from nas._export_options import (
    EXPORT_STAGES,
    add_export_options,
    export_values,
    list_formats,
)
from nas._profile_options import add_profile_commands, add_profile_options, join_command
from nas._score_options import add_score_command
from nas._search_options import (
    SEARCH_STAGES,
    add_search_options,
    add_study_command,
    list_samplers,
    search_values,
)
from nas.import_command import add_import_command

if TYPE_CHECKING:
    from nas.config import ExperimentConfig

EXIT_USAGE = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

STAGES = {
    "run": "everything: profile, train, search, export, report (no arguments: the quick start)",
    "profile": "measure this device's latency table",
    "train": "train the supernet",
    "search": "search archs with the supernet's weights",
    "export": "measure the front again and export its subnetworks",
    "report": "write report.html",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (0, 1 failed, 2 wrong usage, 130 Ctrl-C)."""
    parser = build_parser()
    options = parser.parse_args(join_command(sys.argv[1:] if arguments is None else arguments))
    from searchspace.errors import UserError

    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except UserError as error:
        print(f"nas: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("nas: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="nas",
        description="Hardware-aware neural architecture search for transformers.",
        epilog=_task_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in STAGES.items():
        stage = add_described(commands, name, summary, _task_list())
        _add_run_options(stage)
        stage.set_defaults(command=_run_stage, stage=name)
        if name in SEARCH_STAGES:
            add_search_options(stage)
        if name in EXPORT_STAGES:
            add_export_options(stage)
        if name == "profile":
            add_profile_options(stage, _config_of)
            add_profile_commands(commands)
    add_import_command(commands)
    add_score_command(commands)
    add_study_command(commands)
    add_assign_command(commands)
    add_cluster_command(commands)
    _add_generate(commands)
    doctor = commands.add_parser("doctor", help="what this machine has and what that means")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _task_list() -> str:
    """Return every task with its summary, for the end of a help text."""
    from nas.tasks.registry import TASKS

    width = max(len(name) for name in TASKS)
    lines = [f"  {name:<{width}}  {kind.summary}" for name, kind in TASKS.items()]
    return "\n".join(["tasks (--task):", *lines])


def _tasks_with_data() -> str:
    from nas.tasks.registry import TASKS

    *others, last = (name for name, kind in TASKS.items() if "data" in kind.uses)
    return f"{', '.join(others)} or {last}"


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="TOML file, or a run folder to go on with (default: the quick start's values)",
    )
    parser.add_argument("--preset", help="search space: a preset's name or a TOML file")
    parser.add_argument("--task", metavar="TASK", help="what is learnt, see below")
    parser.add_argument(
        "--data",
        help=f"file, folder or 'GLOB' for --task {_tasks_with_data()}; without --task, text",
    )
    parser.add_argument("--budget", help="wall time of the whole run, such as 10m")
    parser.add_argument("--out", help="run folder (default: runs/quickstart)")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any config key"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_generate(commands: Any) -> None:
    summary = "stream text from an exported subnetwork of a text task"
    generate = commands.add_parser("generate", help=summary, description=summary)
    generate.add_argument("folder", metavar="FOLDER", help="an exported folder, subnets/<arch id>")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--draft",
        metavar="FOLDER|ARCH",
        help="a smaller exported network, or the id of an arch beside FOLDER, that drafts tokens "
        "for this one to verify: the same text, faster",
    )
    generate.add_argument(
        "--draft-tokens", type=int, default=8, metavar="K", help="drafted at a time, at most"
    )
    generate.add_argument(
        "--loose",
        action="store_true",
        help="with --draft and temperature 0: leave ties within the rounding of a low precision as "
        "they come out, which is faster and now and then gives another text, as good",
    )
    generate.set_defaults(command=_generate)


def _run_stage(options: argparse.Namespace) -> int:
    if getattr(options, "list_samplers", False):
        return list_samplers(options.json)
    if getattr(options, "list_formats", False):
        return list_formats(options.json)
    config = _config_of(options)
    from nas.pipeline import Pipeline
    from nas.progress import Reporter

    reporter = Reporter(options.quiet)
    pipeline = Pipeline(config, reporter)
    if options.stage == "run":
        _print_run(pipeline.run(), options.json)
        return 0
    getattr(pipeline, options.stage)()
    if options.stage in ("export", "report"):
        _print_run(pipeline.result(), options.json)
    else:
        _print_stage(options.stage, pipeline.folder.path, options.json)
    return 0


def _config_of(options: argparse.Namespace, **more: Any) -> ExperimentConfig:
    """Return the config that the options of a stage describe."""
    from nas.config import load_config

    path, out = _config_path(options.config, options.out)
    return load_config(
        path,
        options.set,
        preset=options.preset,
        task__name=options.task or ("text" if options.data else None),
        task__data=options.data,
        budget=options.budget,
        out=out,
        seed=options.seed,
        **search_values(options),
        **export_values(options),
        **more,
    )


def _config_path(config: str | None, out: str | None) -> tuple[str | None, str | None]:
    """A run folder given as CONFIG or as --out brings its own config along."""
    if config is not None and Path(config).is_dir():
        return str(Path(config) / "config.json"), out or config
    if config is None and out is not None and (Path(out) / "config.json").is_file():
        return str(Path(out) / "config.json"), out
    return config, out


def _print_stage(stage: str, folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"stage": stage, "folder": str(folder)}))
    else:
        print(f"{stage} done: {folder}")


def _print_run(run: Any, as_json: bool) -> None:
    if as_json:
        subnets = {arch_id: str(path) for arch_id, path in run.subnets.items()}
        print(
            json.dumps({"folder": str(run.folder), "report": str(run.report), "subnets": subnets,
                        "front": run.front})
        )  # fmt: skip
        return
    from rich.console import Console

    from nas.report import front_table

    console = Console()
    console.print(front_table(run.front))
    volumes = run.front["hypervolume"]
    console.print(
        f"hypervolume (measured): front {volumes['front']:.4f}, random archs "
        f"{volumes['random']:.4f}, uniform networks {volumes['uniform']:.4f}"
    )
    print(f"report:   {run.report}")
    best = run.folder / "subnets" / run.front["chosen"]["best"]
    if run.front["unit"] == "byte":
        print(f"generate: nas generate {best} --prompt 'def '")
    else:
        print(f"load:     searchspace.subnet.Subnet.load({str(best)!r})")


def _generate(options: argparse.Namespace) -> int:
    from hw_profiles.process import prepare_process
    from nas.generation import generate_text, speculate_text

    prepare_process()
    request = (options.prompt, options.max_tokens, options.temperature, options.seed)
    speculation = None
    if options.draft is None:
        pieces = generate_text(options.folder, *request)
    else:
        pieces, speculation = speculate_text(
            options.folder, options.draft, *request, options.draft_tokens, not options.loose
        )
    first = next(pieces, "")
    print(options.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if speculation is not None:
        print(speculation.timed().sentence(), file=sys.stderr)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from nas.doctor import collect, render

    facts = collect()
    if options.json:
        print(json.dumps(facts))
        return 0
    from rich.console import Console

    Console().print(render(facts))
    return 0
