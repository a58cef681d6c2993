"""From archs to named features. To add an encoding: a function in a file here, a line below."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from predictors.encodings.aggregate import aggregate
from predictors.encodings.arch_genes import integer, one_hot
from predictors.encodings.features import Features, join
from predictors.encodings.sub_block_bag import adjacency_free
from searchspace.arch import Arch
from searchspace.errors import UserError, unknown
from searchspace.space import SearchSpace

Encoding = Callable[[Sequence[Arch], SearchSpace | None], Features]

ENCODINGS: dict[str, Encoding] = {
    "one_hot": one_hot,
    "integer": integer,
    "aggregate": aggregate,
    "adjacency_free": adjacency_free,
}
"""Every encoding by name. The first two are in the genes of one space, the others need none."""

JOINER = "+"


def encode_archs(
    archs: Sequence[Arch],
    space: SearchSpace | None = None,
    kind: str = "aggregate",
    names: Sequence[str] | None = None,
) -> Features:
    """Return features of archs, one row per arch.

    Args:
        archs: what is encoded. Only encodings that need no space take archs of several.
        space: the archs' space, for encodings of its genes.
        kind: a name in `ENCODINGS`, or several joined by ``+``, such as ``"aggregate+integer"``.
        names: the columns a predictor was fitted on, to get exactly these; see
            `Features.aligned`. None takes all.

    Raises:
        UserError: for an unknown encoding, one that needs a space and got none, an arch that is
            not in the space, or columns that cannot be had.
    """
    parts = kind.split(JOINER)
    for part in parts:
        if part not in ENCODINGS:
            raise unknown("encoding", part, ENCODINGS)
    if len(set(parts)) < len(parts):
        raise UserError(f"encoding {kind!r} names one twice; join different ones")
    features = join(*_without_repeats([ENCODINGS[part](archs, space) for part in parts]))
    return features if names is None else features.aligned(names)


def _without_repeats(parts: Sequence[Features]) -> list[Features]:
    """Leave out columns that an earlier part has under the same name (``d_model``)."""
    seen: set[str] = set()
    kept = []
    for part in parts:
        columns = [i for i, name in enumerate(part.names) if name not in seen]
        kept.append(Features(part.values[:, columns], tuple(part.names[i] for i in columns)))
        seen |= set(part.names)
    return kept
