"""`nas import` writes a run folder, whose training starts from the checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
import torch
from torch import Tensor

from nas.config import ExperimentConfig, load_config
from nas.evaluation import held_out_loss
from nas.import_command import add_import_command
from nas.importing.checkpoint import read_checkpoint
from nas.pipeline import Pipeline
from nas.progress import Reporter
from nas.tasks.checkpoint_tokenizer import read_checkpoint_tokenizer, tokenizer_of
from nas.tasks.labelled import LabelledTask
from nas.tasks.language_model import LanguageModelTask
from nas.tasks.tokenizers import load_tokenizer
from nas.training.batch import Batch
from nas.training.losses import data_loss
from nas.training.trainer import Trainer
from searchspace.errors import UserError
from searchspace.files import read_tensors
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet
from tests.nas.conftest import synthetic_table
from tests.nas.import_models import (
    VOCAB,
    byte_pairs,
    model_of,
    save_checkpoint,
    train_llama,
    word_pieces,
)

pytest.importorskip("transformers")
ONE_THREAD = ("--set", "profile.num_threads=1", "--quiet")
SHORT = ("--set", "task.seq_len=64", "--set", "task.max_train_bytes=100000", *ONE_THREAD)


def run_import(*arguments: object) -> int:
    """Run the command without the rest of the command line."""
    parser = argparse.ArgumentParser()
    add_import_command(parser.add_subparsers())
    options = parser.parse_args(["import", *map(str, arguments)])
    code: int = options.command(options)
    return code


def config_of(run: Path, **train: Any) -> ExperimentConfig:
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in train.items()]
    return load_config(str(run / "config.json"), overrides)


def test_training_starts_from_the_checkpoint(tmp_path: Path, text_file: Path, capsys: Any) -> None:
    folder, run = save_checkpoint("qwen2", tmp_path / "model"), tmp_path / "run"
    training = ("--set", "train.num_steps=1", "--set", "train.precision=fp32")
    assert run_import(folder, "--out", run, "--data", text_file, *SHORT, *training, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["difference"] < 1e-5 and facts["architecture"] == "Qwen2ForCausalLM"
    pipeline = Pipeline(config_of(run), Reporter(quiet=True))
    task, original = pipeline.task, read_checkpoint(folder).subnet()
    assert isinstance(task, LanguageModelTask) and task.vocab_size == VOCAB
    inputs, targets = task.train_batch(0, 8, 0)
    trainer = Trainer(pipeline.space, task, pipeline.config.train, run / "supernet", 0, 1.0)
    trainer.restore()
    assert trainer.teacher is not None
    expected = original(inputs)
    taught = trainer.teacher(Batch.on(inputs.device, inputs, targets)).probs_NV
    torch.testing.assert_close(taught, expected.flatten(0, 1).softmax(-1), rtol=1e-4, atol=1e-6)
    pipeline.train()
    first = json.loads((run / "supernet" / "log.jsonl").read_text().splitlines()[0])
    assert first["largest"] == pytest.approx(float(data_loss(expected, targets)), rel=1e-5)
    with pytest.raises(UserError, match="holds a run already"):
        run_import(folder, "--out", run, "--data", text_file, *SHORT)


def test_bert_with_its_own_words_padding_and_labels(tmp_path: Path) -> None:
    names = {"0": "mail", "1": "code", "2": "news"}
    folder = save_checkpoint("bert", tmp_path / "model", id2label=names, num_labels=3)
    for name in names.values():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            text = f"{name} {number}: " + "words of a text " * (number + 1)
            (tmp_path / "data" / name / f"{number}.txt").write_text(text)
    run, seq_len = tmp_path / "run", 80
    options = ("--set", f"task.seq_len={seq_len}", "--set", "train.num_steps=2", *ONE_THREAD)
    assert run_import(folder, "--data", tmp_path / "data", "--out", run, *options) == 0
    pipeline = Pipeline(config_of(run), Reporter(quiet=True))
    task = pipeline.task
    assert isinstance(task, LabelledTask) and task.labels == ("code", "mail", "news")
    inputs, _ = task.train_batch(0, 6, 0)
    assert (inputs == 0).any() and (inputs == 3).any(1).all()
    supernet = Supernet(pipeline.space, torch.Generator().manual_seed(0))
    supernet.load_state_dict(read_tensors(run / "import" / "supernet.safetensors"))
    model = model_of("bert", num_labels=3)
    whole = torch.cat([torch.full_like(inputs[:, :1], 2), inputs], dim=1)
    with torch.no_grad():
        theirs = model(whole, attention_mask=(whole != 0).long()).logits[:, [1, 0, 2]]
        ours = supernet.view(pipeline.space.largest())(inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pipeline.train()
    assert pipeline.supernet.space.family.mask_padding


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("llama", ["--task", "listops"], "cannot be trained on task=listops"),
        ("bert", ["--task", "stdlib"], "cannot be trained on task=stdlib"),
        ("gpt2", ["--set", "task.seq_len=129"], "more than the 128 positions"),
        ("llama", ["--mixers", "sotfmax"], "did you mean 'softmax'"),
        ("llama", ["--ffn", "150"], "--ffn 150 is out of range"),
    ],
)
def test_mistakes_leave_no_run(
    kind: str, arguments: list[str], sentence: str, tmp_path: Path, text_file: Path
) -> None:
    folder, run = save_checkpoint(kind, tmp_path / "model"), tmp_path / "run"
    data = [] if "--task" in arguments else ["--data", str(text_file)]
    with pytest.raises(UserError, match=sentence):
        run_import(folder, "--out", run, *data, "--no-check", "--quiet", *arguments)
    assert not (run / "config.json").exists()


def test_a_tokenizer_is_needed_and_must_fit(tmp_path: Path, text_file: Path) -> None:
    folder, run = save_checkpoint("llama", tmp_path / "model"), tmp_path / "run"
    byte_pairs(vocab_size=VOCAB + 9, texts=[text_file.read_text()]).save(
        str(folder / "tokenizer.json")
    )
    with pytest.raises(UserError, match=f"has {VOCAB + 9} tokens, the network only {VOCAB}"):
        run_import(folder, "--out", run, "--data", text_file, "--no-check", "--quiet")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer at"):
        run_import(folder, "--out", run, "--data", text_file, "--no-check", "--quiet")


class TestCheckpointTokenizer:
    def test_byte_pairs_are_those_of_the_checkpoint(self, tmp_path: Path, text_file: Path) -> None:
        text = text_file.read_text()[:20_000] + "é\u2028 <|endoftext|>"
        backend = byte_pairs([text])
        backend.save(str(tmp_path / "tokenizer.json"))
        tokenizer = read_checkpoint_tokenizer(tmp_path, "tokenizer.json", VOCAB)
        assert tokenizer.vocab_size == VOCAB and len(tokenizer.token_bytes) == VOCAB
        backend.encode_special_tokens = True
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
        row = tokenizer.encode_documents([text.encode(), b"", b"x"])
        expected = [*tokenizer.encode(text), 0, 0, *tokenizer.encode("x"), 0]
        assert row.tolist() == expected and row.dtype == np.uint16
        assert sum(len(tokenizer.token_bytes[i]) for i in row) == len(text.encode()) + 1
        tokenizer.save(tmp_path / "saved" / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "saved")
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.token_bytes == tokenizer.token_bytes

    def test_sentence_pieces(self) -> None:
        words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b"]
        words += ["\u2581a", "ab"]
        model = hf.models.BPE(
            {word: i for i, word in enumerate(words)}, [("\u2581", "a"), ("a", "b")],
            unk_token="<unk>", byte_fallback=True,
        )  # fmt: skip
        backend = hf.Tokenizer(model)
        backend.normalizer = hf.normalizers.Replace(" ", "\u2581")
        backend.decoder = hf.decoders.Sequence(
            [hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        )
        tokenizer = tokenizer_of(backend)
        text = "ab a\u00e9\n"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.is_lossless and tokenizer.end_name == "</s>"

    def test_word_pieces_do_not_give_the_text_back(self) -> None:
        assert not tokenizer_of(word_pieces()).is_lossless


def mean_losses(supernet: Supernet, half: int, batches: list[tuple[Tensor, Tensor]]) -> float:
    network = supernet.view(supernet.space.uniform(intermediate_size=half))
    with torch.no_grad():
        losses = [data_loss(network(inputs), targets).item() for inputs, targets in batches]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that transformers built, briefly trained on the standard library's sources."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_llama(folder, 300) < 4.2
    return folder


@pytest.fixture(scope="module")
def imported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    keys = ("train.num_steps=40", "train.precision=fp32", "search.evaluation_tokens=2048")
    training = [part for key in keys for part in ("--set", key)]
    assert run_import(trained, "--out", run, *SHORT, *training) == 0
    return run


@pytest.mark.slow
def test_the_most_important_half_loses_clearly_less_than_the_first_half(
    imported: Path, trained: Path
) -> None:
    pipeline = Pipeline(config_of(imported), Reporter(quiet=True))
    batches = pipeline.task.evaluation_batches("validation", 4096, 8)
    supernet = Supernet(pipeline.space, torch.Generator().manual_seed(0))
    read_checkpoint(trained).fill(supernet)
    whole, first = (mean_losses(supernet, size, batches) for size in (192, 96))
    supernet.load_state_dict(read_tensors(imported / "import" / "supernet.safetensors"))
    assert mean_losses(supernet, 192, batches) == pytest.approx(whole, rel=1e-4)
    assert mean_losses(supernet, 96, batches) - whole < 0.6 * (first - whole)


@pytest.mark.slow
def test_from_checkpoint_to_exported_subnetwork(imported: Path) -> None:
    config = load_config(
        str(imported / "config.json"),
        ["search.num_evaluations=8", "search.evaluation_tokens=2048", "search.metric_pool=8",
         "search.population=4", "export.choose=best", "export.front_size=2",
         "export.test_tokens=1024"],
    )  # fmt: skip
    pipeline = Pipeline(config, Reporter(quiet=True))
    smallest, batches = (
        pipeline.space.smallest(),
        pipeline.task.evaluation_batches("validation", 4096, 8),
    )
    untrained = Supernet(pipeline.space, torch.Generator().manual_seed(0))
    untrained.load_state_dict(read_tensors(imported / "import" / "supernet.safetensors"))
    before = held_out_loss(untrained.view(smallest), batches, pipeline.task)
    synthetic_table(pipeline.space).save(pipeline.folder.table)
    pipeline.train()
    assert held_out_loss(pipeline.supernet.view(smallest), batches, pipeline.task) < before - 0.02
    pipeline.search()
    pipeline.export()
    result = pipeline.result()
    (folder,) = result.subnets.values()
    found = json.loads((folder / "export.json").read_text())
    assert found["formats"]["hf"]["verified"]["loss"] == pytest.approx(
        found["supernet_loss"], rel=0.02
    )
    text = load_tokenizer(folder)
    ids = torch.tensor([text.encode("def main(self):\n")])
    assert Subnet.load(folder)(ids).shape == (1, ids.shape[1], 520)
