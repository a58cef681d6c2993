"""`nas import`: a Hugging Face checkpoint becomes the largest network of a supernet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nas._described_command import add_described

SUMMARY = "bring in a pretrained Hugging Face checkpoint as a supernet"
DETAILS = """\
FOLDER holds config.json and safetensors weights of a Llama, Mistral, Qwen2, Qwen3, GPT-2 or of a
BERT with a classifier, and its tokenizer.json. Nothing in it is executed. The weights are copied
as they are, heads and FFN channels ordered by their importance on the task's text, and a run folder
is written; then

  nas run RUN        trains all smaller networks with the checkpoint as their teacher, searches and
                     exports (or stage by stage: nas profile RUN, nas train RUN, ...)
"""
TRAINING = {"matrix_lr": 0.002, "other_lr": 0.0003}
"""Learning rates of the run unless --set says otherwise: a tenth of those from random weights."""


def add_import_command(commands: Any) -> None:
    """Add `nas import` to a parser's commands."""
    parser = add_described(commands, "import", SUMMARY, DETAILS)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the checkpoint, as save_pretrained writes it")
    add("--out", help="run folder (default: runs/NAME OF FOLDER)")
    add("--task", metavar="TASK", help="what is learnt (default: stdlib, or text with --data)")
    add("--data", help="file, folder or 'GLOB' of the task")
    add("--budget", help="wall time of the whole run, such as 10m")
    add("--seed", type=int)
    add("--ffn", type=_percents, metavar="PERCENTS", help="FFN widths (100,75,50,25,0)")
    add("--heads", type=_percents, metavar="PERCENTS", help="key/value heads (100,75,50,25)")
    add("--width", type=_percents, metavar="PERCENTS", help="width of the residual stream (100)")
    add("--min-depth", type=int, metavar="LAYERS", help="never skip more (default: half)")
    add(
        "--mixers",
        type=_names,
        metavar="NAMES",
        help="other mixers that a layer may have, none to leave it out (sliding_window,none)",
    )
    add("--precisions", type=_names, metavar="NAMES", help="of weights (fp32,int8)")
    add("--no-check", action="store_true", help="do not compare with transformers")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any config key")
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> int:
    from hw_profiles.process import prepare_process
    from nas.importing.checkpoint import read_checkpoint
    from nas.importing.run import Import
    from nas.progress import Reporter

    checkpoint = read_checkpoint(Path(options.folder))
    config = _config(options, checkpoint)
    prepare_process(config.profile.num_threads)
    job = Import(checkpoint, config, _choices(options), not options.no_check)
    facts = job.run(Reporter(options.quiet))
    if options.json:
        print(json.dumps({"folder": config.out, **facts}))
        return 0
    losses, half = facts["calibration_loss"], facts["half_of_the_ffn"]
    found = facts["difference"]
    print(f"checkpoint: {facts['checkpoint']}, {facts['architecture']}")
    print(
        "logits:     "
        + (
            "not checked against transformers"
            if found is None
            else f"equal to transformers' within {found:.1e} of the largest"
        )
    )
    print(f"loss:       {losses['largest']:.3f} nats per target on calibration text")
    print(
        f"            {losses['half_of_the_ffn_by_importance']:.3f} with the {half} most important "
        f"FFN channels, {losses['half_of_the_ffn_as_it_came']:.3f} with the first {half}"
    )
    print(f"next:       nas run {config.out}")
    return 0


def _config(options: argparse.Namespace, checkpoint: Any) -> Any:
    """Return the config of the run."""
    from nas.config import load_config
    from nas.importing.run import IMPORT, SPACE, TOKENIZER, check_task_name

    recipe = checkpoint.recipe
    out = options.out or f"runs/{Path(options.folder).resolve().name}"
    inside = Path(out) / IMPORT
    name = options.task
    if name is None and recipe.family.kind == "encoder":
        name = "text_classification"
    if name is None and options.data:
        name = "text"
    if name is not None:
        check_task_name(checkpoint, name)
    seq_len = min(256, recipe.family.max_tokens)
    return load_config(
        None,
        options.set,
        preset=str(inside / SPACE),
        out=out,
        seed=options.seed,
        budget=options.budget,
        task__name=name,
        task__data=options.data,
        task__seq_len=seq_len,
        task__vocab_size=recipe.vocab_size,
        task__tokenizer=None if name == "tokens" else str(inside / TOKENIZER),
        train__start=str(inside),
        **{f"train__{key}": value for key, value in TRAINING.items()},
    )


def _choices(options: argparse.Namespace) -> Any:
    """Return what smaller networks are offered."""
    from nas.importing.spaces import Choices

    given = {
        name: getattr(options, name)
        for name in ("ffn", "heads", "width", "min_depth", "mixers", "precisions")
    }
    return Choices(**{name: value for name, value in given.items() if value is not None})


def _percents(text: str) -> tuple[int, ...]:
    """Read percentages such as ``100,50``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of percentages; write 100,75,50"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    """Read names such as ``softmax,none``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
