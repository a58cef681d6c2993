"""Text from an exported subnetwork, token by token, with its key/value and recurrent state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nas.tasks.tokenizers import TOKENIZER_FILE, StreamDecoder, load_tokenizer
from searchspace.errors import UserError
from searchspace.subnet import Subnet


def generate_tokens(
    subnet: Subnet,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.8,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new token ids, each computed from the state and the last token only.

    Args:
        subnet: the network.
        prompt: at least one token id.
        max_tokens: how many to yield.
        temperature: 0 takes the most probable token every time.
        generator: draws the tokens.

    Raises:
        UserError: for an empty prompt, a negative temperature, or a network that is no decoder.
    """
    if not subnet.arch.family.causal:
        raise UserError(
            f"a network of family {subnet.arch.family.kind!r} predicts a class of its whole input "
            "and continues nothing; call it on inputs for its logits"
        )
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative; choose 0 (greedy) or more")
    with torch.inference_mode():
        state = subnet.init_state(1, len(prompt) + max_tokens)
        tokens = torch.tensor([prompt])
        for _ in range(max_tokens):
            logits_V = subnet(tokens, state)[0, -1]
            token = _draw(logits_V, temperature, generator)
            yield token
            tokens = torch.tensor([[token]])


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


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
    subnet = Subnet.load(folder)
    if not (Path(folder) / TOKENIZER_FILE).exists():
        raise UserError(_why_no_text(subnet, folder))
    tokenizer = load_tokenizer(Path(folder))
    decoder = StreamDecoder(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    for token in generate_tokens(
        subnet, tokenizer.encode(prompt), max_tokens, temperature, generator
    ):
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
