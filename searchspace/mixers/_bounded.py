"""What mixers with parameters for every position have in common."""

from __future__ import annotations

from searchspace.errors import UserError
from searchspace.specs import MixerSpec


def require_room(spec: MixerSpec, tokens: int) -> None:
    """Refuse more tokens than a `bounded` mixer has parameters for.

    Raises:
        UserError: when `tokens` are more than `spec.max_tokens`.
    """
    if tokens > spec.max_tokens:
        raise UserError(
            f"{spec.mixer} is made for at most {spec.max_tokens} tokens and was given {tokens}; "
            "give fewer or choose a larger max_tokens"
        )
