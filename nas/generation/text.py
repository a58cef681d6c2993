"""Text from an exported folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nas.generation.draft import check_tokenizers, find_draft
from nas.generation.plain import generate_tokens
from nas.generation.speculation import DRAFT_TOKENS, Speculation
from nas.tasks.tokenizers import TOKENIZER_FILE, StreamDecoder, Tokenizer, load_tokenizer
from searchspace.errors import UserError
from searchspace.subnet import Subnet


def generate_text(
    folder: Path | str,
    prompt: str,
    max_tokens: int = 128,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[str]:
    """Yield pieces of text that continue `prompt`, from an exported folder.

    Raises:
        UserError: when the folder is no exported subnetwork, or one that writes no text.
    """
    subnet, tokenizer = _load(Path(folder))
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt)
    yield from _pieces(generate_tokens(subnet, ids, max_tokens, temperature, generator), tokenizer)


def speculate_text(
    folder: Path | str,
    draft: Path | str,
    prompt: str,
    max_tokens: int = 128,
    temperature: float = 0.8,
    seed: int = 0,
    draft_tokens: int = DRAFT_TOKENS,
    exact: bool = True,
) -> tuple[Iterator[str], Speculation]:
    """Return pieces of text that continue `prompt`, and what drafting brings (its `timed()`).

    Args:
        folder: the target, an exported folder.
        draft: another one, or the id of an arch exported beside it.
        prompt: text.
        max_tokens: how many new tokens.
        temperature: 0 is greedy.
        seed: of drawn tokens.
        draft_tokens: see `Speculation`.
        exact: see `Speculation`.

    Raises:
        UserError: when a folder is no exported subnetwork of a text task, or they do not fit.
    """
    subnet, tokenizer = _load(Path(folder))
    draft_folder = find_draft(Path(folder), str(draft))
    draft_subnet = Subnet.load(draft_folder)
    check_tokenizers(Path(folder), draft_folder)
    speculation = Speculation(
        subnet,
        draft_subnet,
        tokenizer.encode(prompt),
        max_tokens,
        temperature,
        torch.Generator().manual_seed(seed),
        draft_tokens,
        exact,
    )
    return _pieces(speculation, tokenizer), speculation


def _load(folder: Path) -> tuple[Subnet, Tokenizer]:
    subnet = Subnet.load(folder)
    if not (subnet.arch.family.causal and (folder / TOKENIZER_FILE).exists()):
        raise UserError(_why_no_text(subnet, folder))
    return subnet, load_tokenizer(folder)


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    for token in tokens:
        yield decoder.push(token)
    yield decoder.finish()


def _why_no_text(subnet: Subnet, folder: Path | str) -> str:
    """Return what a network without a tokenizer is and what it can do."""
    arch, family = subnet.arch, subnet.arch.family
    if family.kind == "decoder":
        return (
            f"{folder} has no tokenizer, because its task is about token ids below "
            f"{arch.vocab_size} and not about text; in Python, nas.generation.generate_tokens("
            "Subnet.load(folder), [ids], max_tokens) continues ids"
        )
    size = family.image_size
    inputs = (
        f"images ({family.channels}, {size}, {size})"
        if family.kind == "vit"
        else f"token ids below {arch.vocab_size}"
    )
    return (
        f"{folder} writes no text: it is a classifier of {inputs} into {family.num_classes} "
        "classes; in Python, Subnet.load(folder)(batch) gives the logits of every class"
    )
