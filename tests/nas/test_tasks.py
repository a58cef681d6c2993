"""Tasks: splits, tokenizers, batches, baselines and what is said about bad input."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.tasks import TASKS, TaskConfig, prepare_task
from nas.tasks.language_model import LanguageModelTask, SplitSize, TaskFacts
from nas.tasks.ngrams import byte_symbols, ngram_nats
from nas.tasks.readers import TextReader
from nas.tasks.sources import FINDERS, SourceFile
from nas.tasks.splits import SPLITS, Corpus, split_files
from nas.tasks.tokenizers import (
    BytePairTokenizer,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)
from searchspace.errors import UserError

WORDS = ["def", "return", "self", "value", "for", "in", "range", "import", "class", "None", "x"]


def source_text(num_lines: int, seed: int) -> str:
    """Lines that look like code, different for every seed."""
    rng = random.Random(seed)
    lines = [
        " " * 4 * rng.randrange(4) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 7))) + ":"
        for _ in range(num_lines)
    ]
    return f"# file {seed}\n" + "\n".join(lines) + "\n"


def write_folder(root: Path, num_files: int = 40, num_lines: int = 60) -> Path:
    for index in range(num_files):
        path = root / f"sub{index % 3}" / f"file{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source_text(num_lines, index), encoding="utf-8", newline="")
    return root


def small_config(data: Path | str, **changes: Any) -> TaskConfig:
    config = TaskConfig(
        name="text",
        data=str(data),
        vocab_size=300,
        seq_len=16,
        validation_fraction=0.1,
        test_fraction=0.1,
    )
    return replace(config, **changes)


def corpus_of(files: list[SourceFile], config: TaskConfig) -> Corpus:
    return split_files(files, config, TextReader(), lambda message: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def task(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModelTask:
    return prepare_task(small_config(folder), tmp_path_factory.mktemp("run") / "task")


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairTokenizer:
    documents = [source_text(200, seed).encode() for seed in range(5)]
    return BytePairTokenizer.train(documents, 400)


def test_every_task_can_be_prepared_and_described() -> None:
    fields = {field.name for field in dataclasses.fields(TaskConfig)}
    for name, kind in TASKS.items():
        assert callable(importlib.import_module(kind.module).prepare)
        assert kind.summary and {*kind.uses, *kind.defaults} < fields
        config = TaskConfig(name, data="x" if "data" in kind.uses else None)
        assert TaskConfig(**asdict(config)) == config
        assert {name: asdict(config)[name] for name in kind.defaults} == kind.defaults


def test_registry_and_config_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, nas.tasks; nas.tasks.TaskConfig('listops'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'tokenizers')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# Tokenizers


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\r\n:()aé€😀\0\x85\u2028"))
def test_round_trip(byte_pairs: BytePairTokenizer, text: str) -> None:
    for tokenizer in (byte_pairs, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(len(tokenizer.token_bytes[index]) for index in ids) == len(text.encode())
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(index) for index in ids]
        assert "".join(pieces) == text and decoder.finish() == ""


CODE_CHARACTERS = "aZ_09 \t\r\n\x0b\x1c\x00.:('" + "\x7f"


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(alphabet=CODE_CHARACTERS, min_size=1) | st.text(min_size=1)))
def test_many_documents_get_the_tokens_of_single_ones(
    byte_pairs: BytePairTokenizer, texts: list[str]
) -> None:
    row = byte_pairs.encode_documents([text.encode() for text in texts])
    expected = [index for text in texts for index in [*byte_pairs.encode(text), 0]]
    assert row.tolist() == expected


def test_text_that_spells_the_end_token_is_text(byte_pairs: BytePairTokenizer) -> None:
    text = "a <|endoftext|> b"
    ids = byte_pairs.encode(text)
    assert byte_pairs.end_of_text not in ids
    assert byte_pairs.decode(ids) == text
    row = byte_pairs.encode_documents([text.encode(), b"c"])
    assert row.tolist() == [*ids, 0, *byte_pairs.encode("c"), 0]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_stream_decoder_waits_for_whole_characters(
    kind: str, byte_pairs: BytePairTokenizer
) -> None:
    tokenizer: Tokenizer = byte_pairs if kind == "bpe" else ByteTokenizer()
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("€")
    assert len(ids) == 3  # never seen in training, so one token a byte
    assert [decoder.push(index) for index in ids] == ["", "", "€"]
    assert decoder.push(ids[0]) == ""
    assert decoder.push(tokenizer.end_of_text) == "\ufffd"
    assert decoder.push(ids[0]) == "" and decoder.finish() == "\ufffd"


def test_line_ends_and_indentation_become_tokens(byte_pairs: BytePairTokenizer) -> None:
    assert len(byte_pairs.encode(":\n        ")) == 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_long_documents_get_the_tokens_of_whole_ones(
    byte_pairs: BytePairTokenizer, line_end: str
) -> None:
    lines = source_text(9000, 1).replace(":", "").replace("\n", line_end)
    assert len(lines) > 3 * 65536
    row = byte_pairs.encode_documents([lines.encode()])
    assert row.tolist() == [*byte_pairs.encode(lines), byte_pairs.end_of_text]
    no_line_ends = ("é" * 100 + " ") * 2000
    assert byte_pairs.decode(byte_pairs.encode_documents([no_line_ends.encode()])) == no_line_ends


def test_training_is_deterministic_and_saving_is_lossless(
    byte_pairs: BytePairTokenizer, tmp_path: Path
) -> None:
    documents = [source_text(200, seed).encode() for seed in range(5)]
    again = BytePairTokenizer.train(documents, 400)
    byte_pairs.save(tmp_path / "a" / "tokenizer.json")
    again.save(tmp_path / "b" / "tokenizer.json")
    first, second = (tmp_path / name / "tokenizer.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    loaded = load_tokenizer(tmp_path / "a")
    text = source_text(20, 99) + "<|endoftext|>"
    assert loaded.encode(text) == byte_pairs.encode(text)
    assert (loaded.vocab_size, loaded.end_of_text) == (byte_pairs.vocab_size, 0)
    assert 300 < loaded.vocab_size <= 400
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.json"]


def test_byte_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, ByteTokenizer)
    row = loaded.encode_documents([b"ab", b"", "é".encode()])
    assert row.tolist() == [97, 98, 256, 256, 0xC3, 0xA9, 256]
    assert loaded.encode_documents([]).tolist() == []


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}', '{"kind": "words"}'])
def test_damaged_tokenizer(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot be used as a tokenizer"):
        load_tokenizer(tmp_path)


def test_foreign_tokenizer(tmp_path: Path) -> None:
    import tokenizers as hf

    hf.Tokenizer(hf.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="not a byte-level tokenizer"):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_refused(byte_pairs: BytePairTokenizer) -> None:
    for tokenizer in (byte_pairs, ByteTokenizer()):
        with pytest.raises(UserError, match=r"U\+D800 at position 1"):
            tokenizer.encode("a\ud800")


# Splits


def test_files_are_held_out_whole_and_in_any_order(folder: Path) -> None:
    config = small_config(folder)
    files = FINDERS["text"](str(folder))
    corpus = corpus_of(files, config)
    assert corpus.rule == "files"
    names = {split: set(corpus.parts[split].names) for split in SPLITS}
    assert sum(map(len, names.values())) == 40 == len(set.union(*names.values()))
    total = sum(file.num_bytes for file in files)
    for split in ("validation", "test"):
        assert 0.08 * total < corpus.parts[split].num_bytes < 0.15 * total
    shuffled = random.Random(0).sample(files, len(files))
    assert corpus_of(shuffled, config) == corpus


def test_seed_draws_training_files_but_not_held_out_ones(folder: Path) -> None:
    files = FINDERS["text"](str(folder))
    first, second = (
        corpus_of(files, small_config(folder, seed=seed, max_train_bytes=20_000)) for seed in (0, 1)
    )
    assert first.parts["test"] == second.parts["test"]
    assert first.parts["validation"] == second.parts["validation"]
    assert first.parts["train"].names != second.parts["train"].names
    assert 18_000 < first.parts["train"].num_bytes <= 20_000


def test_same_content_is_never_in_two_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, num_files=20)
    for path in sorted(tmp_path.rglob("*.py")):
        path.with_name("copy_of_" + path.name).write_bytes(path.read_bytes())
    corpus = corpus_of(FINDERS["text"](str(tmp_path)), small_config(tmp_path))
    documents = [text for split in SPLITS for text in corpus.parts[split].documents]
    assert len(documents) == len(set(documents)) == 20
    assert corpus.num_duplicate_files == 20


@pytest.mark.parametrize("text", [source_text(900, 3), "äöü€😀" * 3000], ids=["lines", "no lines"])
def test_one_file_is_cut_into_blocks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.txt"
    path.write_text(text, encoding="utf-8")
    corpus = corpus_of(FINDERS["text"](str(path)), small_config(path))
    assert corpus.rule == "blocks"
    assert b"".join(corpus.parts[split].documents[0] for split in SPLITS) == text.encode()
    for split in ("validation", "test"):
        assert corpus.parts[split].num_bytes == pytest.approx(len(text.encode()) / 10, abs=60)


def test_one_file_larger_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    text = source_text(3000, 3)
    path.write_text(text, encoding="utf-8")
    config = small_config(path, max_train_bytes=20_000)
    corpus = corpus_of(FINDERS["text"](str(path)), config)
    sizes = [corpus.parts[split].num_bytes for split in SPLITS]
    assert sizes == pytest.approx([20_000, 2_500, 2_500], abs=60)
    assert text.encode().startswith(corpus.parts["train"].documents[0])
    tail = b"".join(corpus.parts[split].documents[0] for split in ("validation", "test"))
    assert text.encode().endswith(tail)


def test_one_giant_among_few_files_is_cut_too(tmp_path: Path) -> None:
    write_folder(tmp_path, num_files=4, num_lines=20)
    (tmp_path / "giant.py").write_text(source_text(5000, 77))
    corpus = corpus_of(FINDERS["text"](str(tmp_path)), small_config(tmp_path))
    assert corpus.rule == "blocks"
    assert [len(corpus.parts[split].names) for split in SPLITS] == [5, 5, 5]


def test_glob_and_folder_find_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FINDERS["text"](str(folder))
    assert FINDERS["text"](f"{folder}/**/*.py") == whole
    assert FINDERS["text"](f"{folder}/sub*") == whole
    monkeypatch.chdir(folder)
    relative = FINDERS["text"]("./sub1/*.py")
    assert [file.name for file in relative] == sorted(os.listdir("sub1"))


def test_stdlib_finds_sources_only() -> None:
    names = [file.name for file in FINDERS["stdlib"](None)]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


# The prepared task


def test_reopening_gives_the_same_task(
    task: LanguageModelTask, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "task"
    built = prepare_task(small_config(folder), run)
    written = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    reopened = prepare_task(small_config(folder), run)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == written
    assert built.facts == reopened.facts == task.facts
    assert torch.equal(built.train_tokens.to(torch.int64), reopened.train_tokens.to(torch.int64))
    assert sorted(written) == [
        "task.json",
        "test_tokens.npy",
        "tokenizer.json",
        "train_tokens.npy",
        "validation_tokens.npy",
    ]


@pytest.mark.parametrize("name", ["task.json", "tokenizer.json", "train_tokens.npy"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_half_written_folder_is_built_again(
    folder: Path, tmp_path: Path, name: str, damage: str
) -> None:
    config = small_config(folder)
    first = prepare_task(config, tmp_path)
    batch = first.train_batch(0, 4, 0)[0]
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    again = prepare_task(config, tmp_path)
    assert again.facts == first.facts
    assert torch.equal(again.train_batch(0, 4, 0)[0], batch)


def test_pickled_arrays_are_not_opened(folder: Path, tmp_path: Path) -> None:
    config = small_config(folder)
    prepare_task(config, tmp_path)
    np.save(tmp_path / "train_tokens.npy", np.array([print, None], object), allow_pickle=True)
    assert prepare_task(config, tmp_path).train_tokens.dtype == torch.uint16


def test_other_config_is_refused(folder: Path, tmp_path: Path) -> None:
    prepare_task(small_config(folder), tmp_path)
    with pytest.raises(UserError, match=r"prepared with seq_len=16, but seq_len=32 was asked for"):
        prepare_task(small_config(folder, seq_len=32), tmp_path)


def test_a_folder_of_another_task_is_refused(folder: Path, tmp_path: Path) -> None:
    prepare_task(small_config(folder), tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("digits", "copy", "listops"):
        with pytest.raises(UserError, match=f"prepared with name='text', .*name='{name}'"):
            prepare_task(TaskConfig(name), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_language_models_are_plain_decoders(task: LanguageModelTask) -> None:
    assert (task.family_facts, task.metric_name) == ({}, "loss")
    assert numbered_task(5000, seq_len=2000).family_facts == {"max_tokens": 2000}


def test_batches_follow_from_seed_and_step(task: LanguageModelTask) -> None:
    inputs, targets = task.train_batch(7, 5, seed=3)
    assert inputs.shape == targets.shape == (5, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for step in (9, 2, 1000):
        task.train_batch(step, 5, seed=3)
    assert torch.equal(task.train_batch(7, 5, seed=3)[0], inputs)
    assert not torch.equal(task.train_batch(7, 5, seed=4)[0], inputs)
    assert not torch.equal(task.train_batch(8, 5, seed=3)[0], inputs)


def numbered_task(num_tokens: int, seq_len: int) -> LanguageModelTask:
    """A task whose tokens are their own positions."""
    config = TaskConfig(name="tokens", data="x", vocab_size=65536, seq_len=seq_len)
    tokens = np.arange(num_tokens, dtype=np.uint16)
    sizes = {split: SplitSize(1, num_tokens, num_tokens) for split in SPLITS}
    facts = TaskFacts(65536, "token", "blocks", sizes, {"test": {}, "validation": {}}, 0, 0, "")
    return LanguageModelTask(config, facts, dict.fromkeys(SPLITS, tokens), None)


@pytest.mark.parametrize("num_tokens", [11, 20, 21, 22, 31, 1000, 1009])
def test_an_epoch_shows_every_window_once(num_tokens: int) -> None:
    task = numbered_task(num_tokens, seq_len=10)
    num_windows = max(1, (num_tokens - 1) // 10 - 1)
    offsets = set()
    for epoch in range(5):
        steps = range(epoch * num_windows, (epoch + 1) * num_windows)
        targets = torch.cat([task.train_batch(step, 1, seed=0)[1] for step in steps])
        offsets.add(int(targets.min()))
        expected = torch.arange(int(targets.min()), int(targets.min()) + num_windows * 10)
        assert torch.equal(targets.flatten().sort().values, expected)
        assert int(targets.max()) < num_tokens
    assert len(offsets) > 1 or num_tokens == 11


@pytest.mark.parametrize(("num_tokens", "wanted"), [(11, 1), (11, 999), (1000, 300), (1000, 9999)])
def test_evaluation_windows_are_spread_and_never_overlap(num_tokens: int, wanted: int) -> None:
    task = numbered_task(num_tokens, seq_len=10)
    batches = task.evaluation_batches("test", wanted, batch_size=7)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(inputs + 1, targets)
    assert len(targets) == max(1, min(wanted, num_tokens - 1) // 10)
    assert len(set(targets.flatten().tolist())) == targets.numel()
    assert int(inputs.min()) == 0 and (len(targets) == 1 or int(targets.max()) == num_tokens - 1)
    assert all(len(batch) <= 7 for batch, _ in batches)
    gaps = inputs[1:, 0] - inputs[:-1, 0]
    assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1
    assert task.units_of(targets) == targets.numel()


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_units_are_bytes_and_the_end_of_text_has_none(
    folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    task = prepare_task(small_config(folder, tokenizer=tokenizer), tmp_path)
    assert task.unit == "byte"
    text = "def é():\n    pass"
    ids = task.encode(text)
    assert task.decode(ids) == text
    assert task.tokenizer is not None
    assert task.units_of(torch.tensor([[*ids, task.tokenizer.end_of_text]])) == len(text.encode())
    assert task.units_of(task.train_tokens.to(torch.int64)) == task.facts.sizes["train"].num_units
    assert task.vocab_size == (257 if tokenizer == "bytes" else 300)


def test_token_files(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 4000).astype("<u2")
    path = tmp_path / "corpus.bin"
    tokens.tofile(path)
    config = TaskConfig(
        name="tokens",
        data=str(path),
        vocab_size=50,
        seq_len=16,
        validation_fraction=0.1,
        test_fraction=0.2,
    )
    task = prepare_task(config, tmp_path / "task")
    assert (task.unit, task.vocab_size, task.facts.split_rule) == ("token", 50, "blocks")
    assert task.train_tokens.tolist() == tokens[:2800].tolist()
    last = task.evaluation_batches("test", 10**6, 1)[-1][1]
    assert last[0].tolist() == tokens[-16:].tolist()
    assert task.baselines.keys() == {"unigram", "bigram"}
    assert task.baselines["unigram"] == pytest.approx(math.log(50), abs=0.05)
    for action in (lambda: task.encode("a"), lambda: task.decode([1]), task.stream_decoder):
        with pytest.raises(UserError, match="has no tokenizer"):
            action()
    by_text = prepare_task(
        replace(config, name="text", data=f"{tmp_path}/*.bin", vocab_size=300), tmp_path / "text"
    )
    assert by_text.unit == "token" and by_text.tokenizer is None


# Baselines


def slow_nats(
    train: list[int], held_out: list[int], num_symbols: int, max_order: int
) -> list[float]:
    """Witten-Bell, one symbol and one dictionary look-up at a time."""
    totals = [0.0] * max_order
    grams = [
        Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        for n in range(1, max_order + 1)
    ]
    for place in range(max_order - 1, len(held_out)):
        probability = 1 / num_symbols
        for order in range(1, max_order + 1):
            gram = tuple(held_out[place - order + 1 : place + 1])
            same = {g: c for g, c in grams[order - 1].items() if g[:-1] == gram[:-1]}
            if same:
                count = same.get(gram, 0) + len(same) * probability
                probability = count / (sum(same.values()) + len(same))
            totals[order - 1] -= math.log(probability)
    return totals


@pytest.mark.parametrize(("num_symbols", "max_order"), [(7, 3), (257, 3), (60_000, 2)])
def test_ngrams_equal_a_slow_count(num_symbols: int, max_order: int) -> None:
    rng = np.random.default_rng(0)
    train, held_out = (
        ((rng.zipf(1.5, size) - 1) % num_symbols).astype(np.uint16) for size in (800, 90)
    )
    fast = ngram_nats(train, {"test": held_out}, num_symbols, max_order)["test"]
    slow = slow_nats(train.tolist(), held_out.tolist(), num_symbols, max_order)
    assert list(fast.values()) == pytest.approx(slow, rel=1e-9)


def test_ngram_counting_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train, held_out = (rng.integers(0, 9, size).astype(np.uint16) for size in (1000, 50))
    whole = ngram_nats(train, {"test": held_out}, 9, 3)
    monkeypatch.setattr("nas.tasks.ngrams._CHUNK", 7)
    assert ngram_nats(train, {"test": held_out}, 9, 3) == whole
    monkeypatch.setattr("nas.tasks.ngrams._DENSE_KEYS", 0)
    assert ngram_nats(train, {"test": held_out}, 9, 3) == whole


def test_ngrams_sum_to_one() -> None:
    train = byte_symbols([b"abracadabra", b"abba"])
    held_out = {str(last): np.array([*b"ab", last], np.uint16) for last in range(257)}
    nats = ngram_nats(train, held_out, 257, 3)
    total = sum(math.exp(-result["trigram"]) for result in nats.values())
    assert total == pytest.approx(1.0)


def test_task_baselines_are_nats_per_byte(
    folder: Path, task: LanguageModelTask, tmp_path: Path
) -> None:
    corpus = corpus_of(FINDERS["text"](str(folder)), small_config(folder))
    train, held_out = (byte_symbols(corpus.parts[split].documents) for split in ("train", "test"))
    nats = ngram_nats(train, {"test": held_out}, 257, 3)["test"]
    num_bytes = corpus.parts["test"].num_bytes - 2  # a trigram cannot predict the first two
    assert task.baselines == {name: total / num_bytes for name, total in nats.items()}
    assert task.baselines["trigram"] < task.baselines["bigram"] < task.baselines["unigram"]
    assert task.facts.baselines["validation"].keys() == task.baselines.keys()
    as_bytes = prepare_task(small_config(folder, tokenizer="bytes"), tmp_path)
    assert as_bytes.baselines == task.baselines


# What is said about bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "stdlb"}, "unknown task 'stdlb': did you mean 'stdlib'"),
        ({"tokenizer": "byte"}, "unknown tokenizer 'byte': did you mean 'bytes'"),
        ({"name": "stdlib", "data": "a"}, "data='a' was given with task=stdlib.*task=text"),
        ({"name": "text"}, "task=text needs data; give a file"),
        ({"name": "tokens", "data": ""}, "task=tokens needs data"),
        ({"vocab_size": 256}, "vocab_size=256 is out of range for task=stdlib; choose 257 to"),
        ({"vocab_size": 65537}, "vocab_size=65537 is out of range"),
        ({"name": "tokens", "data": "a", "vocab_size": 1}, "vocab_size=1 .* choose 2 to 65536"),
        ({"seq_len": 0}, "seq_len=0 is too small"),
        ({"max_train_bytes": 0}, "max_train_bytes=0 is too small"),
        ({"test_fraction": 0.0}, "test_fraction=0.0 is out of range"),
        ({"validation_fraction": 0.9}, "validation_fraction=0.9 is out of range"),
        ({"seed": -1}, "task seed=-1 is negative"),
        (
            {"max_depth": 4},
            "max_depth=4 was given with task=stdlib, which does not use it.*seq_len",
        ),
    ],
)
def test_bad_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskConfig(**changes)


def refused(tmp_path: Path, config: TaskConfig) -> str:
    """Prepare what cannot be prepared; nothing may be left behind. Returns the message."""
    with pytest.raises(UserError) as caught:
        prepare_task(config, tmp_path / "out" / "task")
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


def test_nothing_matches(tmp_path: Path) -> None:
    config = small_config(tmp_path / "none*.txt")
    assert refused(tmp_path, config).startswith(f"no file matches data={config.data!r}")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path, small_config(tmp_path / "empty")).startswith("no file matches")


def test_path_that_cannot_be(tmp_path: Path) -> None:
    assert "cannot be looked up" in refused(tmp_path, small_config("x" * 5000))
    (tmp_path / "a.txt").write_text("text")
    message = refused(tmp_path, small_config(tmp_path / "a.txt" / "b.txt"))
    assert message.startswith("no file matches")


def test_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert f"{tmp_path / 'a.txt'} is empty" in refused(tmp_path, small_config(tmp_path / "a.txt"))
    (tmp_path / "b.txt").touch()
    assert "all 2 files are empty" in refused(tmp_path, small_config(tmp_path / "*.txt"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"abc\0" * 5000, r"is not text (NUL byte at offset 3)"),
        (b"caf\xe9 " * 5000, r"is not UTF-8 text (byte 0xe9 at offset 3)"),
        (b"x" * 20_000 + b"\xff", r"is not UTF-8 text (byte 0xff at offset 20000)"),
        ("é".encode() * 10_000 + b"\xc3", r"is not UTF-8 text (byte 0xc3 at offset 20000)"),
    ],
)
def test_binary_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(content)
    assert refused(tmp_path, small_config(path)) == f"{path} {reason}; give UTF-8 text"


def test_folder_of_binary_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(4):
        (data / f"{index}.png").write_bytes(bytes([index]) + b"\0\xff" * 9000)
    message = refused(tmp_path, small_config(data))
    assert message.startswith("none of the 4 files that match can be used, for example")
    assert "0.png is not text (NUL byte at offset 0); give UTF-8 text" in message


def test_some_binary_files_are_skipped_and_counted(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data")
    (data / "picture.png").write_bytes(b"\0\xff" * 500_000)
    (data / "late.txt").write_bytes(b"text " * 3000 + b"\xff")
    messages: list[str] = []
    task = prepare_task(small_config(data), tmp_path / "task", messages.append)
    assert "skipped 2 of 42 files that are not UTF-8 text" in messages
    assert task.facts.num_skipped_files == 2
    assert sum(size.num_files for size in task.facts.sizes.values()) == 40


def test_too_short_text(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("hello")
    message = refused(tmp_path, small_config(path))
    assert message.startswith("too little data: it has 5 bytes, but about 170 are needed")
    assert "seq_len=16" in message and "validation_fraction=0.1" in message


def test_text_too_short_only_in_tokens(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(source_text(12, 0))
    num_bytes = path.stat().st_size
    assert num_bytes > 170
    message = refused(tmp_path, small_config(path))
    assert message.startswith(f"too little data: it has {num_bytes} bytes, but about ")
    num_needed = int(message.split("about ")[1].split()[0])
    path.write_text(source_text(1000, 0)[:num_needed])
    prepare_task(small_config(path), tmp_path / "task")


def test_max_train_bytes_that_uses_too_little(folder: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, small_config(folder, max_train_bytes=100))
    assert message.startswith("max_train_bytes=100 uses too little of the data's")


def test_bad_token_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    config = TaskConfig(name="tokens", data=str(path), vocab_size=100, seq_len=4)
    path.write_bytes(b"\0" * 9001)
    assert f"{path} has an odd length of 9001 bytes" in refused(tmp_path, config)
    tokens = np.zeros(5000, "<u2")
    tokens[4321] = 100
    tokens.tofile(path)
    message = refused(tmp_path, config)
    assert f"{path} holds token 100 at position 4321, not below vocab_size=100" in message
    np.zeros(10, "<u2").tofile(path)
    assert "too little data: it has 20 bytes" in refused(tmp_path, config)
    text = tmp_path / "a.txt"
    text.write_text("text" * 1000)
    assert f"{text} is not a .bin file" in refused(tmp_path, replace(config, data=str(text)))


def test_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory.*; choose"):
        prepare_task(small_config(folder), tmp_path / "file" / "task")


def test_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_synced = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal num_synced
        num_synced += 1
        if num_synced > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr("searchspace.files.os.fsync", fsync)
    with pytest.raises(UserError, match="No space left on device; choose another folder"):
        prepare_task(small_config(folder), tmp_path / "task")
    assert list((tmp_path / "task").iterdir()) == []


@pytest.mark.slow
def test_stdlib_reaches_the_known_figures(tmp_path: Path) -> None:
    task = prepare_task(TaskConfig(), tmp_path)
    assert task.vocab_size == 1024 and task.facts.split_rule == "files"
    assert task.facts.sizes["train"].num_units <= 24_000_000
    for split in ("validation", "test"):
        baselines = task.facts.baselines[split]
        assert baselines["unigram"] == pytest.approx(3.3, abs=0.15)
        assert baselines["bigram"] == pytest.approx(2.5, abs=0.15)
        assert baselines["trigram"] == pytest.approx(1.85, abs=0.15)
        size = task.facts.sizes[split]
        assert size.num_units / size.num_tokens > 2.4
        batches = task.evaluation_batches(split, 50_000, 32)
        assert sum(targets.numel() for _, targets in batches) == 50_000 // 256 * 256
    assert asdict(task.config) == asdict(TaskConfig())
