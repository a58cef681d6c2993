"""The model card: what a folder holds, how it is loaded, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from searchspace.arch import Arch
from searchspace.files import write_text

CARD = "README.md"
USES = {
    "decoder": ("text-generation", '"A beginning", max_new_tokens=50', "tokenizer.json"),
    "encoder": ("text-classification", '"A text", truncation=True', "tokenizer.json"),
    "vit": ("image-classification", '"picture.png"', "preprocessor_config.json"),
}
"""For every kind of family the pipeline of transformers, its arguments, and the file it needs."""


def write_card(folder: Path, arch: Arch, content: Mapping[str, Any]) -> None:
    """Write the card.

    Args:
        folder: of the subnetwork.
        arch: the network.
        content: that of `export.json`.
    """
    lines = [
        "---",
        "library_name: transformers",
        "tags: [hwnas]",
        "---",
        f"# Subnetwork {arch.id}",
        "",
        f"A {arch.family.kind} of {arch.depth} layers and width {arch.d_model}, found by "
        "hardware-aware architecture search.",
        "",
        *_layers(arch),
        "",
        f"Loss on held-out data, in nats per {content['unit']}; latencies in ms, on the machine "
        "that exported it, of one sequence:",
        "",
        *_formats(content),
        *_recovered(content),
        "",
        *_use(folder, arch.family.kind),
        "",
    ]
    write_text(folder / CARD, "\n".join(lines))


def _use(folder: Path, kind: str) -> list[str]:
    """Return how the folder is used, where it holds what turns a text or a picture into inputs."""
    task, argument, needed = USES[kind]
    if not (folder / needed).exists():
        return []
    return [
        "```python",
        "from transformers import pipeline",
        "",
        f'run = pipeline("{task}", model="PATH OF THIS FOLDER", trust_remote_code=True)',
        f"run({argument})",
        "```",
    ]


def _layers(arch: Arch) -> list[str]:
    rows = ["| layer | mixer | FFN | norm |", "|---|---|---|---|"]
    for index, layer in enumerate(arch.layers):
        if layer.skip:
            continue
        mixer = f"{layer.mixer}, {layer.num_heads} heads, {layer.mixer_precision}"
        ffn = f"{layer.ffn}, {layer.intermediate_size} wide, {layer.ffn_precision}"
        rows.append(f"| {index} | {mixer} | {ffn} | {layer.norm} |")
    return rows


def _recovered(content: Mapping[str, Any]) -> list[str]:
    """Return what training on alone has brought, if that was done."""
    facts = content.get("recovered")
    if not facts:
        return []
    before, after = facts["loss_before"], facts["loss_after"]
    return [
        "",
        f"It trained on alone for {facts['steps']} steps, which brought its validation loss from "
        f"{before:.4f} to {after:.4f}.",
    ]


def _formats(content: Mapping[str, Any]) -> list[str]:
    rows = ["| format | MB | loss | prefill | decode |", "|---|---|---|---|---|"]
    for name, facts in content["formats"].items():
        if "refused" in facts:
            rows.append(f"| {name} | - | left out: {facts['refused']} | - | - |")
            continue
        found = facts["verified"]
        decode = f"{found['decode_ms']:.2f}" if "decode_ms" in found else "-"
        rows.append(
            f"| {name} | {found['file_bytes'] / 1e6:.2f} | {found['loss']:.4f} | "
            f"{found['prefill_ms']:.2f} | {decode} |"
        )
    return rows
