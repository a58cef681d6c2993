"""Self-speculative decoding: acceptance and speed-up for pairs of a run's exported subnetworks.

    python -m tests.benchmarks.speculative --run runs/quickstart --json > speculative.json

The targets are the networks with the lowest loss of the front, or those of --targets; each is
tried with every faster one as its draft (or --drafts). Texts are continuations of the run's test
tokens. Every round decodes each text by the target alone and then with each draft, so that a
change of the clock falls on all of them; the speed-up is the median over texts and rounds of the
ratio to the target alone on the same text in the same round. `same` counts greedy texts that equal
the target's own token for token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hw_profiles.device import Device
from hw_profiles.process import prepare_process
from nas.config import load_config
from nas.generation import Speculation, generate_tokens
from nas.run_folder import RunFolder
from nas.tasks import prepare_task
from searchspace.errors import UserError
from searchspace.files import read_json
from searchspace.subnet import Subnet

COLUMNS = ("target", "draft", "params", "accepted", "tokens/call", "alone tok/s", "drafted tok/s",
           "speed-up", "same", "settled")  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's folder")
    parser.add_argument("--targets", nargs="+", help="arch ids (default: the three best)")
    parser.add_argument("--drafts", nargs="+", help="arch ids (default: all with less to compute)")
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loose", action="store_true", help="see `nas generate --loose`")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    rows = run(arguments)
    if arguments.json:
        facts = {"device": Device.current().to_dict(), "threads": arguments.threads}
        print(json.dumps({**facts, "rows": rows}, indent=1))
    else:
        print(table_text(rows))


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all pairs; returns a row for each."""
    folder = RunFolder(arguments.run)
    front = read_json(folder.front, "front")["groups"]["front"]
    exported = [r for r in front if (folder.subnets / r["arch_id"] / "config.json").is_file()]
    exported.sort(key=lambda r: r["measured"]["loss"])
    if len(exported) < 2:
        raise UserError(f"{folder.subnets} holds fewer than two networks; run `nas export` first")
    networks = {r["arch_id"]: Subnet.load(folder.subnets / r["arch_id"]) for r in exported}
    order = list(networks)
    prompts = prompts_of(folder, arguments)
    rows = []
    for target in arguments.targets or order[:3]:
        drafts = arguments.drafts or order[order.index(target) + 1 :]
        rows += measure(networks, target, drafts, prompts, arguments)
    return rows


def prompts_of(folder: RunFolder, arguments: argparse.Namespace) -> list[list[int]]:
    """Return beginnings of test sequences."""
    task = prepare_task(load_config(str(folder.config), []).task, folder.task)
    wanted = arguments.texts * task.seq_len
    texts = [row for inputs, _ in task.evaluation_batches("test", wanted, 1) for row in inputs]
    return [row[: arguments.prompt_tokens].tolist() for row in texts[: arguments.texts]]


def measure(
    networks: dict[str, Subnet],
    target: str,
    drafts: list[str],
    prompts: list[list[int]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Decode every text by a target, alone and with each draft, in turns."""
    found: dict[str, list[dict[str, Any]]] = {draft: [] for draft in drafts}
    for round_ in range(arguments.rounds + 1):
        for number, prompt in enumerate(prompts):
            tokens, alone_s = alone(networks[target], prompt, number, arguments)
            for draft in drafts:
                pair = networks[target], networks[draft]
                result = drafted(*pair, prompt, number, arguments)
                if round_:  # the first one is for caches and lazily made tables
                    same = result.pop("tokens") == tokens
                    found[draft].append({**result, "alone_s": alone_s, "same": same})
    return [row(networks, target, draft, results) for draft, results in found.items()]


def alone(
    network: Subnet, prompt: list[int], seed: int, arguments: argparse.Namespace
) -> tuple[list[int], float]:
    """Return the tokens of a target and the seconds of all but the first."""
    generator = torch.Generator().manual_seed(seed)
    stream = generate_tokens(network, prompt, arguments.tokens, arguments.temperature, generator)
    tokens = [next(stream)]
    began = time.perf_counter()
    tokens += stream
    return tokens, time.perf_counter() - began


def drafted(
    target: Subnet, draft: Subnet, prompt: list[int], seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return tokens, seconds of all but the first, and what was accepted."""
    generator = torch.Generator().manual_seed(seed)
    speculation = Speculation(
        target, draft, prompt, arguments.tokens, arguments.temperature, generator,
        arguments.draft_tokens, not arguments.loose,
    )  # fmt: skip
    stream = iter(speculation)
    tokens = [next(stream)]
    began = time.perf_counter()
    tokens += stream
    return {**speculation.facts.to_dict(), "tokens": tokens, "s": time.perf_counter() - began}


def row(
    networks: dict[str, Subnet], target: str, draft: str, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the medians of a pair."""

    def total(name: str) -> float:
        return sum(result[name] for result in results)

    def per_second(name: str) -> float:
        return statistics.median((r["num_tokens"] - 1) / r[name] for r in results)

    return {
        "target": target,
        "draft": draft,
        "target_params": params(networks[target]),
        "draft_params": params(networks[draft]),
        "acceptance": total("num_accepted") / max(1, total("num_drafted")),
        "tokens_per_target_call": (total("num_tokens") - len(results)) / total("target_calls"),
        "alone_tokens_per_s": per_second("alone_s"),
        "drafted_tokens_per_s": per_second("s"),
        "speedup": statistics.median(r["alone_s"] / r["s"] for r in results),
        "num_same": int(total("same")),
        "num_texts": len(results),
        "num_settled_step_by_step": int(total("num_recounted")),
    }


def params(network: Subnet) -> int:
    """Return the number of stored values."""
    return sum(tensor.numel() for tensor in network.state_dict().values())


def table_text(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table."""
    lines = [
        (
            r["target"], r["draft"], f"{r['draft_params'] / r['target_params']:.0%}",
            f"{r['acceptance']:.0%}", f"{r['tokens_per_target_call']:.2f}",
            f"{r['alone_tokens_per_s']:,.0f}", f"{r['drafted_tokens_per_s']:,.0f}",
            f"{r['speedup']:.2f}", f"{r['num_same']}/{r['num_texts']}",
            str(r["num_settled_step_by_step"]),
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    cells = [COLUMNS, *lines]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


if __name__ == "__main__":
    main()
