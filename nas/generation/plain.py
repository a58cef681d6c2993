"""Tokens from one network, each computed from its state and the last token only.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nas.generation.reader import Reader
from searchspace.errors import UserError
from searchspace.subnet import Subnet


def generate_tokens(
    subnet: Subnet,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 0.8,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new token ids.

    Args:
        subnet: the network.
        prompt: at least one token id.
        max_tokens: how many to yield.
        temperature: 0 takes the most probable token every time.
        generator: draws the tokens.

    Raises:
        UserError: for an empty prompt, a negative temperature, or a network that is no decoder.
    """
    check_request(subnet, prompt, temperature)
    reader, sequence = Reader(subnet, len(prompt) + max_tokens), list(prompt)
    for _ in range(max_tokens):
        token = choose(reader.read(sequence)[0], temperature, generator)
        yield token
        sequence.append(token)


def check_request(subnet: Subnet, prompt: Sequence[int], temperature: float) -> None:
    """Raise a `UserError` for what `generate_tokens` refuses."""
    if not subnet.arch.family.causal:
        raise UserError(
            f"a network of family {subnet.arch.family.kind!r} predicts a class of its whole input "
            "and continues nothing; call it on inputs for its logits"
        )
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative; choose 0 (greedy) or more")


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """Return the best token id, or one that is drawn."""
    if temperature == 0:
        return int(logits_V.argmax())
    return draw(probabilities(logits_V, temperature), generator)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the probabilities (..., V) that tokens are drawn with."""
    return (logits / temperature).softmax(-1)


def draw(probs_V: Tensor, generator: torch.Generator | None) -> int:
    """Return a token id drawn with these probabilities."""
    return int(torch.multinomial(probs_V, 1, generator=generator))
