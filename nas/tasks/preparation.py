"""From files to a prepared language modelling task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nas.tasks.base import Progress
from nas.tasks.checkpoint_tokenizer import read_checkpoint_tokenizer
from nas.tasks.config import TaskConfig
from nas.tasks.language_model import LanguageModelTask, SplitSize, TaskFacts
from nas.tasks.ngrams import byte_symbols, ngram_nats
from nas.tasks.readers import Reader, TextReader, TokenReader
from nas.tasks.sources import FINDERS, SourceFile
from nas.tasks.splits import SPLITS, Corpus, SplitName, split_files
from nas.tasks.storage import open_task, save_task
from nas.tasks.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer
from searchspace.errors import UserError

Tokens = Mapping[SplitName, NDArray[Any]]


def prepare(config: TaskConfig, folder: Path, progress: Progress) -> LanguageModelTask:
    """Open the task that a folder holds, or build it there; see `nas.tasks.prepare_task`."""
    found = open_task(folder)
    if found is not None:
        return found
    files = FINDERS[config.name](config.data)
    is_tokens = config.name == "tokens" or _all_token_files(config, files)
    reader: Reader = TokenReader(config.vocab_size) if is_tokens else TextReader()
    _check_total(sum(file.num_bytes for file in files), config, bytes_per_token=1 + is_tokens)
    progress(f"reading {_count(len(files), 'file')}")
    corpus = split_files(files, config, reader, progress)
    _check_total(corpus.num_bytes, config, bytes_per_token=1 + is_tokens)
    tokenizer = None if is_tokens else _make_tokenizer(corpus, config, progress)
    tokens = _tokenize(corpus, tokenizer, progress)
    _check_lengths(corpus, tokens, config)
    progress("counting n-grams for the baselines")
    facts = _facts(corpus, tokens, tokenizer, config)
    save_task(folder, config, facts, tokens, tokenizer)
    task = open_task(folder)
    if task is None:
        raise UserError(f"{folder} changed while the task was written; start again")
    return task


def _all_token_files(config: TaskConfig, files: list[SourceFile]) -> bool:
    return config.name == "text" and all(file.path.suffix == ".bin" for file in files)


def _make_tokenizer(corpus: Corpus, config: TaskConfig, progress: Progress) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.has_own_tokenizer:
        path = Path(config.tokenizer)
        own = read_checkpoint_tokenizer(path.parent, path.name, config.vocab_size)
        if not own.is_lossless:
            raise UserError(
                f"{path} is a tokenizer of {own.kind}, which do not give the text back, so a loss "
                "per byte has no meaning; use it with task=text_classification"
            )
        return own
    progress(f"learning a byte-pair tokenizer of {config.vocab_size} tokens")
    tokenizer = BytePairTokenizer.train(corpus.parts["train"].documents, config.vocab_size)
    if tokenizer.vocab_size < config.vocab_size:
        progress(f"the text is so short that only {tokenizer.vocab_size} tokens were found")
    return tokenizer


def _tokenize(corpus: Corpus, tokenizer: Tokenizer | None, progress: Progress) -> Tokens:
    if tokenizer is None:
        return {
            split: np.frombuffer(b"".join(corpus.parts[split].documents), "<u2").astype(np.uint16)
            for split in SPLITS
        }
    num_bytes = sum(corpus.parts[split].num_bytes for split in SPLITS)
    progress(f"encoding {num_bytes / 1e6:.1f} MB")
    return {split: tokenizer.encode_documents(corpus.parts[split].documents) for split in SPLITS}


def _facts(
    corpus: Corpus, tokens: Tokens, tokenizer: Tokenizer | None, config: TaskConfig
) -> TaskFacts:
    units = {
        split: corpus.parts[split].num_bytes if tokenizer else len(tokens[split])
        for split in SPLITS
    }
    return TaskFacts(
        vocab_size=tokenizer.vocab_size if tokenizer else config.vocab_size,
        unit="byte" if tokenizer else "token",
        split_rule=corpus.rule,
        sizes={
            split: SplitSize(len(corpus.parts[split].names), len(tokens[split]), units[split])
            for split in SPLITS
        },
        baselines=_baselines(corpus, None if tokenizer else tokens, config.vocab_size),
        num_skipped_files=corpus.num_skipped_files,
        num_duplicate_files=corpus.num_duplicate_files,
        files_sha256=corpus.files_sha256,
    )


def _baselines(
    corpus: Corpus, tokens: Tokens | None, vocab_size: int
) -> dict[SplitName, dict[str, float]]:
    """Return nats per byte of byte n-grams, or nats per token where there are only tokens."""
    if tokens is None:
        symbols = {split: byte_symbols(corpus.parts[split].documents) for split in SPLITS}
        num_symbols, max_order = 257, 3
    else:
        symbols, num_symbols, max_order = dict(tokens), vocab_size, 2
    held_out: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    nats = ngram_nats(
        symbols["train"], {split: symbols[split] for split in held_out}, num_symbols, max_order
    )
    result: dict[SplitName, dict[str, float]] = {}
    for split in held_out:
        predicted = symbols[split][max_order - 1 :]
        num_units = max(len(predicted) if tokens else int((predicted != 256).sum()), 1)
        result[split] = {name: total / num_units for name, total in nats[split].items()}
    return result


def _check_total(num_bytes: int, config: TaskConfig, bytes_per_token: int) -> None:
    """Refuse data of which one split would surely be shorter than one window."""
    held_out = config.validation_fraction + config.test_fraction
    smallest = min(config.validation_fraction, config.test_fraction, 1 - held_out)
    num_needed = math.ceil((config.seq_len + 1) * bytes_per_token / smallest)
    if min(num_bytes, config.max_train_bytes / (1 - held_out)) < num_needed:
        raise _too_short(num_bytes, num_needed, config)


def _check_lengths(corpus: Corpus, tokens: Tokens, config: TaskConfig) -> None:
    """Refuse splits shorter than one window, now that it is known what a token is worth."""
    share = min(len(tokens[split]) for split in SPLITS) / (config.seq_len + 1)
    if share < 1:
        num_used = sum(corpus.parts[split].num_bytes for split in SPLITS)
        # Parts do not grow evenly, hence a tenth more.
        num_needed = math.ceil(1.1 * num_used / max(share, 1 / (config.seq_len + 1)))
        raise _too_short(corpus.num_bytes, num_needed, config)


def _too_short(num_bytes: int, num_needed: int, config: TaskConfig) -> UserError:
    needed = (
        f"about {num_needed} are needed so that training, validation "
        f"(validation_fraction={config.validation_fraction:g}) and test "
        f"(test_fraction={config.test_fraction:g}) each hold a window of seq_len={config.seq_len}"
    )
    if num_bytes >= num_needed:
        return UserError(
            f"max_train_bytes={config.max_train_bytes} uses too little of the data's {num_bytes} "
            f"bytes: {needed}; raise max_train_bytes or choose a smaller seq_len"
        )
    return UserError(
        f"too little data: it has {_count(num_bytes, 'byte')}, but {needed}; give more or choose "
        "a smaller seq_len"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
