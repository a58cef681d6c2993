"""n-gram baselines: what counting alone reaches, so that a loss can be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("unigram", "bigram", "trigram")
# Counting more than this changes the figures of a trigram by less than their last digit.
MAX_TRAIN_SYMBOLS = 64_000_000
# A table of all possible n-grams is faster than sorting, unless it is mostly empty.
_DENSE_KEYS = 1 << 25
_MAX_KEYS_PER_SYMBOL = 16
_CHUNK = 4_000_000

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class _Counts:
    """All n-grams of one order that occur, as sorted keys in base ``num_symbols``."""

    keys: Int64
    counts: Int64
    contexts: Int64
    context_counts: Int64
    context_types: Int64


def ngram_nats(
    train: NDArray[Any],
    held_out: Mapping[str, NDArray[Any]],
    num_symbols: int,
    max_order: int,
) -> dict[str, dict[str, float]]:
    """Return the total cross-entropy of interpolated Witten-Bell n-grams on held-out symbols.

    ``p(w | c) = (count(c w) + types(c) p(w | shorter c)) / (count(c) + types(c))``, down to the
    uniform distribution; nothing is tuned. Every order predicts the same symbols, those from
    ``max_order - 1`` on.

    Args:
        train: symbols to count, in [0, num_symbols).
        held_out: symbols to predict, by name of the split.
        num_symbols: how many symbols there are.
        max_order: 1 for unigram only, up to 3 for trigram.

    Returns:
        ``result[split]["bigram"]`` in nats, summed over the predicted symbols.

    Source: Witten and Bell 1991, method C; Chen and Goodman 1999, section 2.6.
    """
    probabilities = {
        split: np.full(max(len(symbols) - max_order + 1, 0), 1.0 / num_symbols)
        for split, symbols in held_out.items()
    }
    nats: dict[str, dict[str, float]] = {split: {} for split in held_out}
    for order in range(1, max_order + 1):
        counts = _count(train[:MAX_TRAIN_SYMBOLS], order, num_symbols)
        for split, symbols in held_out.items():
            keys = _keys(symbols[max_order - order :], order, num_symbols)
            probabilities[split] = _interpolate(counts, keys, num_symbols, probabilities[split])
            nats[split][NAMES[order - 1]] = float(-np.log(probabilities[split]).sum())
    return nats


def byte_symbols(documents: Sequence[bytes]) -> NDArray[np.uint16]:
    """Return bytes of documents in one row, with symbol 256 behind each document."""
    symbols = np.full(sum(map(len, documents)) + len(documents), 256, np.uint16)
    start = 0
    for document in documents:
        symbols[start : start + len(document)] = np.frombuffer(document, np.uint8)
        start += len(document) + 1
    return symbols


def _interpolate(
    counts: _Counts, keys: Int64, num_symbols: int, shorter: NDArray[np.float64]
) -> NDArray[np.float64]:
    count = _look_up(counts.keys, counts.counts, keys)
    context_keys = keys // num_symbols
    context_count = _look_up(counts.contexts, counts.context_counts, context_keys)
    # A context never seen leaves the shorter one's probability as it is: (0 + t p) / (0 + t).
    types = np.maximum(_look_up(counts.contexts, counts.context_types, context_keys), 1)
    result: NDArray[np.float64] = (count + types * shorter) / (context_count + types)
    return result


def _look_up(keys: Int64, values: Int64, wanted: Int64) -> Int64:
    """Return the value at each wanted key, 0 where it does not occur."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


def _keys(symbols: NDArray[Any], order: int, num_symbols: int) -> Int64:
    """Return each run of ``order`` symbols as one number, the last symbol lowest."""
    length = max(len(symbols) - order + 1, 0)
    keys = np.zeros(length, np.int64)
    for shift in range(order):
        keys *= num_symbols
        keys += symbols[shift : shift + length]
    return keys


def _count(symbols: NDArray[Any], order: int, num_symbols: int) -> _Counts:
    keys, counts = _unique(symbols, order, num_symbols)
    contexts, starts = np.unique(keys // num_symbols, return_index=True)
    return _Counts(
        keys=keys,
        counts=counts,
        contexts=contexts,
        context_counts=np.add.reduceat(counts, starts) if len(keys) else counts,
        context_types=np.diff(np.append(starts, len(keys))),
    )


def _unique(symbols: NDArray[Any], order: int, num_symbols: int) -> tuple[Int64, Int64]:
    num_keys = num_symbols**order
    if num_keys > min(_DENSE_KEYS, _MAX_KEYS_PER_SYMBOL * len(symbols)):
        keys, counts = np.unique(_keys(symbols, order, num_symbols), return_counts=True)
        return keys, counts.astype(np.int64)
    table = np.zeros(num_keys, np.int32)
    for start in range(0, len(symbols), _CHUNK):
        chunk = symbols[start : start + _CHUNK + order - 1]
        table += np.bincount(_keys(chunk, order, num_symbols), minlength=num_keys).astype(np.int32)
    keys = np.flatnonzero(table).astype(np.int64)
    return keys, table[keys].astype(np.int64)
