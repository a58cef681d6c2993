"""ListOps of the Long Range Arena: what is the value of a long nested expression?

Source: Tay et al. 2020, "Long Range Arena: A Benchmark for Efficient Transformers", section 2.2.1.
It has 96,000, 2,000 and 2,000 expressions of more than 500 and fewer than 2,000 tokens. Here both
ends of the range count as well, and the default one is 100 to 500, so that a CPU can learn it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nas.tasks.base import Progress
from nas.tasks.config import TaskConfig
from nas.tasks.expressions import PAD, PATTERN, TOKENS, Ints, Rules, grow
from nas.tasks.input_forms import RowTokenizer, symbol_backend
from nas.tasks.labelled import Examples, LabelledFacts, LabelledTask
from nas.tasks.labelled_storage import open_labelled, save_labelled
from nas.tasks.splits import SplitName
from searchspace.errors import UserError

NUM_HELD_OUT = 2000
"""Expressions of the validation split, and of the test split."""
_TREES_AT_A_TIME = 4096
# Fewer trees than this per wanted expression, and the lengths asked for are next to impossible.
_MAX_TREES_PER_EXAMPLE = 2000


def prepare(config: TaskConfig, folder: Path, progress: Progress) -> LabelledTask:
    """Open the expressions that a folder holds, or generate them; see `nas.tasks.prepare_task`."""
    found = open_labelled(folder)
    if found is not None:
        return found
    progress(f"generating {config.number('num_examples')} ListOps expressions")
    rules = rules_of(config)
    facts = LabelledFacts(
        {"kind": "encoder", "num_classes": 10, "max_tokens": rules.max_length, "pad_token": PAD},
        vocab_size=PAD + 1,
        seq_len=rules.max_length,
        labels=tuple("0123456789"),
    )
    examples = generate(rules, config.number("num_examples"), config.seed)
    task = LabelledTask(facts, examples, RowTokenizer(symbol_backend(TOKENS, PATTERN), PAD))
    save_labelled(folder, config, task)
    return task


def rules_of(config: TaskConfig) -> Rules:
    """Return the sizes that a config asks for."""
    names = ("min_length", "max_length", "max_depth", "max_args")
    return Rules(*(config.number(name) for name in names))


def generate(rules: Rules, num_examples: int, seed: int) -> dict[SplitName, Examples]:
    """Return expressions that are all different, over the three splits together.

    Args:
        rules: how large they are.
        num_examples: of the training split.
        seed: of the training split; the held-out splits do not depend on it.

    Raises:
        UserError: when expressions of the wanted lengths hardly ever come up.
    """
    seen: set[bytes] = set()
    # The held-out splits come first, so that their content is theirs whatever the seed.
    test = _draw(rules, NUM_HELD_OUT, np.random.default_rng([0]), seen)
    validation = _draw(rules, NUM_HELD_OUT, np.random.default_rng([1]), seen)
    train = _draw(rules, num_examples, np.random.default_rng([2, seed]), seen)
    return {"train": train, "validation": validation, "test": test}


def _draw(rules: Rules, number: int, rng: np.random.Generator, seen: set[bytes]) -> Examples:
    """Return so many expressions that are not in `seen`, and put them there."""
    tokens: list[Ints] = []
    values: list[Ints] = []
    found = tried = 0
    while found < number:
        if tried > _MAX_TREES_PER_EXAMPLE * max(number, NUM_HELD_OUT):
            raise UserError(
                f"only {found} of {number} different ListOps expressions of {rules.min_length} to "
                f"{rules.max_length} tokens came up in {tried} tries; ask for a wider range of "
                "lengths, more max_depth or fewer examples"
            )
        tokens_RT, values_R = grow(rules, rng, _TREES_AT_A_TIME)
        tried += _TREES_AT_A_TIME
        new: list[int] = []
        for row, content in enumerate(tokens_RT.astype(np.uint8)):
            key = content.tobytes().rstrip(bytes([PAD]))
            if key not in seen and found + len(new) < number:
                seen.add(key)
                new.append(row)
        found += len(new)
        tokens.append(tokens_RT[new].astype(np.uint8))
        values.append(values_R[new])
    return Examples(np.concatenate(tokens), np.concatenate(values))
