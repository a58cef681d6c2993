"""What a person may say about a task."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nas.tasks.registry import TASKS, TaskKind
from searchspace.errors import UserError, unknown

TOKENIZER_NAMES = ("bpe", "bytes")
MIN_BPE_VOCAB_SIZE = 257
MAX_VOCAB_SIZE = 65536
MAX_OWN_VOCAB_SIZE = 1 << 24

# What the fields may be that only some tasks have.
_LIMITS = {
    "num_examples": (1, 10_000_000),
    "min_length": (1, 100_000),
    "max_length": (1, 100_000),
    "max_depth": (2, 100),
    "max_args": (2, 100),
    "num_items": (1, 100_000),
    "evaluation_items": (1, 100_000),
    "num_symbols": (2, 4096),
}


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt, from which files or by which rules, cut up how.

    Fields that end in None below belong to some tasks only; the task's own default, which stands
    in `nas.tasks.registry.TASKS`, is filled in.

    Args:
        name: a name in `TASKS`. ``"text"`` becomes ``"tokens"`` when every file that ``data``
            matches ends in ``.bin``.
        data: a file, a folder (searched recursively, hidden entries left out) or a glob with
            ``**``; for ``"text"`` and ``"tokens"``. For ``"text_classification"`` a folder whose
            sub-folders are the classes.
        tokenizer: ``"bpe"`` (byte-level byte pairs), ``"bytes"``, or the path of a checkpoint's
            ``tokenizer.json``; not used by token files. ``"text_classification"`` reads bytes
            unless it is such a path.
        vocab_size: tokens the byte-pair tokenizer may have, end-of-text included; for token files
            the vocabulary that they were written with, for a path that of the network it belongs
            to. ``"bytes"`` always has 257.
        seq_len: tokens in one window; for ``"text_classification"`` bytes kept of a file.
        max_train_bytes: training files are drawn in an order that depends on ``seed`` up to here.
        validation_fraction: share of the bytes (of the files of each class) held out for the
            search.
        test_fraction: share held out for the final figures.
        seed: chooses the training files where there are more than ``max_train_bytes``, and the
            training expressions of ``"listops"``; what is held out does not depend on it, so
            losses of different seeds are comparable.
        num_examples: training expressions of ``"listops"``.
        min_length: tokens of the shortest expression.
        max_length: tokens of the longest expression.
        max_depth: operators and the value in them that may be nested; 2 is one operator.
        max_args: most arguments of an operator; the fewest are 2.
        num_items: symbols of the longest string to ``"copy"``, pairs of ``"context_lookup"``.
        evaluation_items: the same in held-out sequences; None is as many as in training.
        num_symbols: symbols that strings, or keys and values each, are made of.

    Raises:
        UserError: a name is unknown, or a value is out of range or does not go with another one.
    """

    name: str = "stdlib"
    data: str | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 1024
    seq_len: int = 256
    max_train_bytes: int = 24_000_000
    validation_fraction: float = 0.03
    test_fraction: float = 0.03
    seed: int = 0
    num_examples: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    max_depth: int | None = None
    max_args: int | None = None
    num_items: int | None = None
    evaluation_items: int | None = None
    num_symbols: int | None = None

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise unknown("task", self.name, TASKS)
        if self.tokenizer not in TOKENIZER_NAMES and not self.has_own_tokenizer:
            raise unknown("tokenizer", self.tokenizer, [*TOKENIZER_NAMES, "FILE.json"])
        self._check_data()
        self._check_used(TASKS[self.name])
        self._check_vocab_size()
        self._check_sizes()
        self._fill(TASKS[self.name])
        self._check_expressions()
        self._check_keys()

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether `tokenizer` is the path of a file."""
        return self.tokenizer.endswith(".json")

    def number(self, field: str) -> int:
        """Return the value of a field that the task has; None stands for ``num_items``."""
        value = getattr(self, field)
        return int(self.number("num_items") if value is None else value)

    def _check_data(self) -> None:
        if self.name == "stdlib" and self.data is not None:
            raise UserError(
                f"data={self.data!r} was given with task=stdlib, which reads Python's own "
                "sources; add task=text to learn from your files"
            )
        if "data" not in TASKS[self.name].uses or self.data:
            return
        if self.name == "text_classification":
            raise UserError(
                "task=text_classification needs data; give a folder with one sub-folder of text "
                "files per class"
            )
        raise UserError(
            f"task={self.name} needs data; give a file, a folder or a quoted glob such as "
            "--data 'notes/**/*.txt'"
        )

    def _check_used(self, kind: TaskKind) -> None:
        """Refuse what was given but means nothing to this task."""
        known = {"name", *kind.uses, *kind.defaults}
        if self.name == "text_classification" and self.has_own_tokenizer:
            known |= {"tokenizer", "vocab_size"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in known and value != field.default:
                its = ", ".join((*kind.uses, *kind.defaults))
                raise UserError(
                    f"{field.name}={value!r} was given with task={self.name}, which does not use "
                    f"it; leave it out ({f'it has {its}' if its else 'it has no parameters'})"
                )

    def _check_vocab_size(self) -> None:
        if self.has_own_tokenizer and self.name != "tokens":
            self._check_own_vocab_size()
            return
        if "vocab_size" not in TASKS[self.name].uses:
            return
        if self.tokenizer == "bytes" and self.name != "tokens":
            return
        low = 2 if self.name == "tokens" else MIN_BPE_VOCAB_SIZE
        if not low <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is out of range for task={self.name}; choose "
                f"{low} to {MAX_VOCAB_SIZE}"
            )

    def _check_own_vocab_size(self) -> None:
        if not 2 <= self.vocab_size <= MAX_OWN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is out of range for a tokenizer of a file; give "
                f"that of the network it belongs to, at most {MAX_OWN_VOCAB_SIZE}"
            )

    def _check_sizes(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"seq_len={self.seq_len} is too small; choose 1 or more")
        if self.seed < 0:
            raise UserError(f"task seed={self.seed} is negative; choose 0 or more")
        if self.max_train_bytes < 1:
            raise UserError(
                f"max_train_bytes={self.max_train_bytes} is too small; choose 1 or more"
            )
        for field in ("validation_fraction", "test_fraction"):
            value = getattr(self, field)
            if not 0.0 < value <= 0.4:
                raise UserError(f"{field}={value} is out of range; choose more than 0, at most 0.4")

    def _fill(self, kind: TaskKind) -> None:
        """Put in the task's defaults and check the range of what was given."""
        for field, default in kind.defaults.items():
            value = getattr(self, field)
            if value is None:
                object.__setattr__(self, field, default)
                continue
            low, high = _LIMITS[field]
            if not low <= value <= high:
                raise UserError(f"{field}={value} is out of range; choose {low} to {high}")

    def _check_expressions(self) -> None:
        if self.name != "listops":
            return
        low, high = self.number("min_length"), self.number("max_length")
        if low > high:
            raise UserError(
                f"min_length={low} is more than max_length={high}; choose at most {high}"
            )
        longest = 1
        for _ in range(self.number("max_depth") - 1):
            longest = min(2 + self.number("max_args") * longest, high)
        if longest < low:
            raise UserError(
                f"no expression of max_depth={self.max_depth} and max_args={self.max_args} has "
                f"min_length={low} tokens, the longest has {longest}; lower min_length or raise "
                "max_depth"
            )

    def _check_keys(self) -> None:
        if self.name != "context_lookup":
            return
        for field in ("num_items", "evaluation_items"):
            if self.number(field) > self.number("num_symbols"):
                raise UserError(
                    f"{field}={self.number(field)} pairs need as many different keys, but "
                    f"num_symbols={self.num_symbols}; raise num_symbols or lower {field}"
                )
