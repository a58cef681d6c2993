"""Text and tokens from exported subnetworks, alone or with a smaller one that drafts."""

from __future__ import annotations

from nas.generation.draft import find_draft
from nas.generation.facts import SpeculationFacts
from nas.generation.plain import generate_tokens
from nas.generation.speculation import Speculation
from nas.generation.text import generate_text, speculate_text

__all__ = [
    "Speculation",
    "SpeculationFacts",
    "find_draft",
    "generate_text",
    "generate_tokens",
    "speculate_text",
]
