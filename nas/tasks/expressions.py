"""ListOps expressions, grown level by level for many trees at once.

A node is an operator with probability 0.25, else a digit; an operator has 2 to `max_args`
arguments; all choices are uniform; nodes at `max_depth` are digits. An expression is kept if its
length is wanted. Its tokens are its nodes in reading order and a closing bracket per operator; the
round brackets of the published files only spell out a binary tree and are dropped, as the Long
Range Arena does when it reads them.

Legend: R trees (roots), N nodes of one level, T tokens.

Source: Nangia and Bowman 2018, "ListOps: A Diagnostic Dataset for Latent Tree Learning"; Tay et al.
2020, "Long Range Arena", section 2.2.1 (operators, lengths, depth 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Spelling of every token id; padding is the id behind them."""
MIN, MAX, MED, SM, END = range(10, 15)
PAD = len(TOKENS)
PATTERN = r"\[MIN|\[MAX|\[MED|\[SM|\]|[0-9]"
"""Matches every spelling."""
OPERATOR_PROBABILITY = 0.25

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """How large expressions may be; see `nas.tasks.TaskConfig`."""

    min_length: int
    max_length: int
    max_depth: int
    max_args: int


def grow(rules: Rules, rng: np.random.Generator, num_trees: int) -> tuple[Ints, Ints]:
    """Grow trees and keep those of a wanted length.

    Args:
        rules: sizes.
        rng: draws the trees.
        num_trees: how many are tried.

    Returns:
        tokens_RT, padded with `PAD` to `rules.max_length`, and values_R (0 to 9) of the R kept.
    """
    levels, lengths = _shapes(rules, rng, num_trees)
    wanted = (lengths >= rules.min_length) & (lengths <= rules.max_length)
    kept = _spread(wanted, levels)
    levels = [args[keep] for args, keep in zip(levels, kept, strict=True)]
    symbols = [
        np.where(args > 0, rng.integers(MIN, END, len(args)), rng.integers(0, 10, len(args)))
        for args in levels
    ]
    values = symbols[-1]
    for args, symbol in zip(levels[-2::-1], symbols[-2::-1], strict=True):
        values = _apply(symbol, args, values)
    return _spell(levels, symbols, rules.max_length), values


def _shapes(rules: Rules, rng: np.random.Generator, num_trees: int) -> tuple[list[Ints], Ints]:
    """Draw the number of arguments of every node, level by level; 0 is a digit.

    Returns:
        The levels, and the length of every tree in tokens. A tree that has become too long grows
        no further: it will be dropped, and deep ones would fill the memory.
    """
    levels: list[Ints] = []
    root_of = np.arange(num_trees)
    lengths = np.zeros(num_trees, np.int64)
    for depth in range(1, rules.max_depth + 1):
        is_operator = rng.random(len(root_of)) < OPERATOR_PROBABILITY
        args = rng.integers(2, rules.max_args + 1, len(root_of))
        args *= is_operator & (depth < rules.max_depth)
        lengths += np.bincount(root_of, 1 + (args > 0), num_trees).astype(np.int64)
        args[(lengths > rules.max_length)[root_of]] = 0
        levels.append(args)
        root_of = np.repeat(root_of, args)
        if not len(root_of):
            break
    return levels, lengths


def _spread(roots: NDArray[np.bool_], levels: list[Ints]) -> list[NDArray[np.bool_]]:
    """Return a flag of each root for every node below it."""
    flags = [roots]
    for args in levels[:-1]:
        flags.append(np.repeat(flags[-1], args))
    return flags


def _sizes(levels: list[Ints]) -> list[Ints]:
    """Return how many tokens every node and what is below it take."""
    sizes = [np.ones_like(levels[-1])]
    for args in levels[-2::-1]:
        ends = np.cumsum(args)
        total = np.concatenate([[0], np.cumsum(sizes[0])])
        sizes.insert(0, np.where(args > 0, 2 + total[ends] - total[ends - args], 1))
    return sizes


def _apply(symbols: Ints, args: Ints, children: Ints) -> Ints:
    """Return the values of one level's nodes, given those of the level below."""
    values = symbols.copy()
    nodes = np.flatnonzero(args)
    if not len(nodes):
        return values
    num_args = args[nodes]
    starts = np.cumsum(num_args) - num_args
    in_order = children[np.lexsort((children, np.repeat(nodes, num_args)))]
    middle = in_order[starts + (num_args - 1) // 2] + in_order[starts + num_args // 2]
    results = {
        MIN: in_order[starts],
        MAX: in_order[starts + num_args - 1],
        MED: middle // 2,  # published as int(median): the mean of the middle two, cut off
        SM: np.add.reduceat(children, starts) % 10,
    }
    for operator, result in results.items():
        chosen = symbols[nodes] == operator
        values[nodes[chosen]] = result[chosen]
    return values


def _spell(levels: list[Ints], symbols: list[Ints], width: int) -> Ints:
    """Return the tokens of each tree in reading order, (R, width)."""
    sizes = _sizes(levels)
    tokens = np.full(len(levels[0]) * width, PAD)
    places = np.arange(len(levels[0])) * width
    for depth, args in enumerate(levels):
        tokens[places] = symbols[depth]
        nodes = np.flatnonzero(args)
        tokens[places[nodes] + sizes[depth][nodes] - 1] = END
        if len(nodes):
            below = sizes[depth + 1]
            before = np.cumsum(below) - below
            first = before[np.cumsum(args[nodes]) - args[nodes]]
            places = before + np.repeat(places[nodes] + 1 - first, args[nodes])
        else:
            break
    return tokens.reshape(-1, width)
