"""Speculative decoding: a small network drafts, the target verifies many tokens in one call.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Zhang et
al. 2024, "Draft & Verify" (the draft is a part of the target itself).

Shapes: K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nas.generation.draft import check_pair
from nas.generation.facts import SpeculationFacts
from nas.generation.plain import check_request, choose, draw, probabilities
from nas.generation.reader import Reader
from nas.generation.ties import Stepper, near_of, rounds_activations
from nas.generation.verdict import greedy_verdict, sampling_verdict
from searchspace.errors import UserError
from searchspace.subnet import Subnet

DRAFT_TOKENS = 8
REPLAYED_TOKENS = 16
"""A target whose state cannot be set back reads accepted tokens again with the next drafted ones,
up to so many; then they are read in a call of their own, whose state is kept."""
TIMED_TOKENS = 32


class Speculation:
    """New tokens of a target network, drafted by another; iterate over it once.

    Greedy tokens are those of `generate_tokens`, one by one. Reading several tokens in a call adds
    numbers in another order than reading one, which can differ in the last bits: where the two best
    logits are that near, the target decides step by step, from a second state that is brought up to
    that token. A target in another precision than fp32 can turn last bits into a step of its grid,
    so that many more are that near; without `exact` those are left as they come out, which is
    faster and was measured to change 1 token in 2,000 for another that is as good. Drawn tokens
    have exactly the target's distribution.

    Args:
        target: the network whose tokens are wanted.
        draft: a faster network with the same vocabulary.
        prompt: at least one token id.
        max_tokens: how many new tokens.
        temperature: 0 takes the most probable token every time.
        generator: draws.
        draft_tokens: drafted tokens per call of the target, at most; fewer while they are refused.
        exact: settle step by step what rounding to a low precision might turn, too.

    Raises:
        UserError: for what `generate_tokens` refuses, or networks that do not fit together.
    """

    def __init__(
        self,
        target: Subnet,
        draft: Subnet,
        prompt: list[int],
        max_tokens: int,
        temperature: float = 0.8,
        generator: torch.Generator | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        exact: bool = True,
    ) -> None:
        check_request(target, prompt, temperature)
        check_pair(target, draft)
        if draft_tokens < 1:
            raise UserError(f"draft_tokens={draft_tokens} drafts nothing; choose 1 or more")
        self.temperature, self.generator = temperature, generator
        self.most, self.count = draft_tokens, min(draft_tokens, 4)
        self.length = len(prompt) + max_tokens
        self.target, self.draft = Reader(target, self.length), Reader(draft, self.length)
        self.stepper = Stepper(target, len(prompt), self.length)
        self.near = near_of(target, exact)
        self.prompt, self.sequence = list(prompt), list(prompt)
        loose = temperature == 0 and rounds_activations(target) and not exact
        self.facts = SpeculationFacts(near_enough=loose)

    def __iter__(self) -> Iterator[int]:
        if len(self.sequence) == self.length:
            return
        logits_V = self.target.read(self.sequence)[0]
        yield self._extend(choose(logits_V, self.temperature, self.generator))
        while (left := self.length - len(self.sequence)) > 0:
            began = time.perf_counter()
            new = self._round(min(self.count, left - 1))
            self._add(seconds=time.perf_counter() - began)
            for token in new:
                yield self._extend(token)

    def _extend(self, token: int) -> int:
        self.sequence.append(token)
        self._add(num_tokens=1)
        return token

    def _add(self, **more: float) -> None:
        old = vars(self.facts)
        self.facts = replace(self.facts, **{k: old[k] + v for k, v in more.items()})

    def _round(self, num_drafts: int) -> list[int]:
        """Return the next tokens: accepted ones, and one of the target's own."""
        known = len(self.sequence)
        drafted, draft_probs = self._draft(num_drafts)
        if not self.target.rewinds and known - self.target.num_read > REPLAYED_TOKENS:
            self.target.read(self.sequence[:-1])
            self._add(target_calls=1)
        self.target.mark()
        text = self.sequence + drafted
        logits = self.target.read(text, num_drafts + 1)
        if self.temperature == 0:
            near = self.near * max(1.0, float(logits.abs().max()))
            accepted, token = greedy_verdict(
                drafted, logits, near, lambda place: self._recount(text[: known + place])
            )
        else:
            target_probs = probabilities(logits, self.temperature)
            accepted, token = sampling_verdict(drafted, draft_probs, target_probs, self.generator)
        for reader in (self.target, self.draft):
            reader.unread(known + accepted)
        self._adapt(num_drafts, accepted)
        self._add(target_calls=1, num_drafted=num_drafts, num_accepted=accepted)
        return [*drafted[:accepted], token]

    def _draft(self, num_drafts: int) -> tuple[list[int], list[Tensor]]:
        """Return drafted tokens and, unless greedy, the probabilities they were drawn with."""
        began = time.perf_counter()
        text, probs = list(self.sequence), []
        for place in range(num_drafts):
            logits_V = self.draft.read(text)[0]
            if place == 0:
                self.draft.mark()
            if self.temperature == 0:
                text.append(int(logits_V.argmax()))
            else:
                probs.append(probabilities(logits_V, self.temperature))
                text.append(draw(probs[-1], self.generator))
        self._add(draft_seconds=time.perf_counter() - began)
        return text[len(self.sequence) :], probs

    def _recount(self, text: list[int]) -> int:
        self._add(num_recounted=1)
        return self.stepper.choice(text)

    def _adapt(self, num_drafts: int, accepted: int) -> None:
        """Draft more after full acceptance, less after a refusal.

        Only counts decide, no clock, so that a seed gives the same tokens everywhere.
        """
        if accepted == num_drafts:
            self.count = min(self.most, self.count + 2)
        else:
            self.count = max(1, min(self.count - 1, accepted + 2))

    def timed(self) -> SpeculationFacts:
        """Return the facts with the speed of the target alone, measured on the text so far."""
        reader = Reader(self.target.subnet, self.length)
        reader.read(self.prompt)
        first = len(self.prompt) + 1
        places = range(first, min(len(self.sequence), first + TIMED_TOKENS))
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        for place in places:
            choose(reader.read(self.sequence[:place])[0], self.temperature, generator)
        seconds = time.perf_counter() - began
        return replace(self.facts, plain_seconds_per_token=seconds / max(1, len(places)))
