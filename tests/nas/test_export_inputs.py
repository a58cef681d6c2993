"""Classifiers' folders take texts and pictures, not only tensors, and say the names of classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nas.export.base import Handover
from nas.export.huggingface import HuggingFaceExporter
from nas.export.huggingface.exporter import modules_cache
from nas.export.huggingface.image_processing_hwnas import HwnasImageProcessor
from nas.tasks import TaskConfig, prepare_task
from nas.tasks.checkpoint_tokenizer import tokenizer_of
from nas.tasks.expressions import PAD, PATTERN, TOKENS
from nas.tasks.input_forms import Picture, RowTokenizer, symbol_backend
from nas.tasks.labelled import LabelledTask
from nas.tasks.labelled_storage import open_labelled
from nas.tasks.text_rows import ByteRows, TextRows, TokenRows
from searchspace.subnet import Subnet
from tests.nas.export_cases import ENCODER, VIT, random_subnet, relative
from tests.nas.import_models import word_pieces

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")
LABELS = ("eggs", "ham", "spam")
TEXTS = ["spam", "naïve Σ [PAD] 🙂\x00", "a much longer text " * 3, "x" * 15, "x" * 16, "[SEP] end"]
DIGITS = 24


def encoder(vocab_size: int, pad: int) -> Subnet:
    family = replace(ENCODER.family, pad_token=pad)
    return random_subnet(replace(ENCODER, vocab_size=vocab_size, family=family))


def folder_of(network: Subnet, form: Any, labels: Sequence[str], folder: Path) -> Path:
    """Write a folder; its inputs have 16 tokens."""
    folder.mkdir()
    about = {
        "unit": "example", "vocab_size": network.arch.vocab_size, "seq_len": 16,
        "classes": list(labels),
    }  # fmt: skip
    HuggingFaceExporter().write(Handover(network, about, input_form=form), folder)
    return folder


def answers_of(folders: Sequence[Path], home: Path) -> list[dict[str, Any]]:
    """Return what a process says that has none of our packages."""
    script = Path(__file__).with_name("foreign_inputs.py")
    settings = {"PYTHONPATH": "", "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, folders)],
        cwd=home, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / "found.json").read_text()) for folder in folders]


def check_answer(found: dict[str, Any], expected: Tensor, labels: Sequence[str]) -> None:
    """Compare with the logits of the task's own inputs."""
    assert relative(torch.tensor(found["logits"]), expected) < 1e-6
    scores, classes = expected.softmax(-1).max(-1)
    for said, score, label in zip(found["said"], scores, classes, strict=True):
        assert said["label"] == labels[label]
        assert said["score"] == pytest.approx(float(score), rel=1e-4)


def digits_task(tmp_path: Path) -> LabelledTask:
    task = prepare_task(TaskConfig("digits"), tmp_path)
    assert isinstance(task, LabelledTask) and isinstance(task.input_form, Picture)
    return task


@torch.inference_mode()
@pytest.mark.slow
def test_texts_and_pictures_are_understood_where_none_of_our_packages_is(tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    (tmp_path / "home").mkdir()
    readers: dict[str, TextRows] = {
        "bytes": ByteRows(16), "words": TokenRows(tokenizer_of(word_pieces()), 16)
    }  # fmt: skip
    folders, wanted = [], []
    for name, rows in readers.items():
        network = encoder(rows.vocab_size, rows.pad)
        folders.append(folder_of(network, rows.tokenizer(), LABELS, tmp_path / name))
        (folders[-1] / "given.json").write_text(json.dumps(TEXTS))
        ids = rows.rows([text.encode()[: rows.num_bytes] for text in TEXTS])
        wanted.append((network(torch.from_numpy(ids.astype("i8"))), LABELS))
    task = digits_task(tmp_path)
    network = random_subnet(replace(VIT, family=replace(VIT.family, num_classes=10)))
    folders.append(folder_of(network, task.input_form, task.labels, tmp_path / "digits"))
    pixels, _ = load_digits(return_X_y=True)
    names = [f"{index}.png" for index in range(DIGITS)]
    for name, row in zip(names, pixels, strict=False):
        Image.fromarray(np.rint(row.reshape(8, 8) * 255 / 16).astype("u1")).save(folders[-1] / name)
    (folders[-1] / "given.json").write_text(json.dumps(names))
    assert isinstance(task.input_form, Picture)
    images = task.input_form.scaled(pixels[:DIGITS]).reshape(-1, 1, 8, 8)
    wanted.append((network(torch.from_numpy(images)), task.labels))
    for found, (logits, labels) in zip(answers_of(folders, tmp_path / "home"), wanted, strict=True):
        check_answer(found, logits, labels)


def test_tokenizers_give_the_ids_of_the_rows(tmp_path: Path) -> None:
    readers: list[TextRows] = [ByteRows(16), TokenRows(tokenizer_of(word_pieces()), 16)]
    for rows in readers:
        form, folder = rows.tokenizer(), tmp_path / type(rows).__name__
        folder_of(encoder(rows.vocab_size, rows.pad), form, LABELS, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.pad_token_id == rows.pad and len(tokenizer) == rows.vocab_size
        assert tokenizer.model_max_length == 16
        found = tokenizer(TEXTS, padding="max_length", truncation=True)
        expected = rows.rows([text.encode()[: rows.num_bytes] for text in TEXTS])
        assert found["input_ids"] == expected.tolist()
        assert set(found) == {"input_ids", "attention_mask"}


def test_expressions_are_read_with_and_without_spaces(tmp_path: Path) -> None:
    form = RowTokenizer(symbol_backend(TOKENS, PATTERN), PAD)
    folder = folder_of(encoder(PAD + 1, PAD), form, "abc", tmp_path / "listops")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [11, 2, 9, 10, 4, 7, 14, 0, 14]
    for text in (
        "[MAX 2 9 [MIN 4 7 ] 0 ]",
        "[MAX2 9[MIN 4 7]0]",
        "( ( ( ( [MAX 2 ) 9 ) ( ( [MIN 4 ) 7 ) ] ) 0 ) ]",
    ):
        assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == "[MAX 2 9 [MIN 4 7 ] 0 ]"
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("[MAX x 1 ]")


def test_a_task_remembers_its_tokenizer(tmp_path: Path) -> None:
    for label in LABELS:
        for number in range(4):
            (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / label / f"{number}.txt").write_text(f"{label} {number}")
    tokenizer_of(word_pieces()).save(tmp_path / "words.json")
    own = {"tokenizer": str(tmp_path / "words.json"), "vocab_size": word_pieces().get_vocab_size()}
    for name, options in (("bytes", {}), ("words", own)):
        config = TaskConfig("text_classification", str(tmp_path / "data"), seq_len=16, **options)  # type: ignore[arg-type]
        made, opened = (prepare_task(config, tmp_path / name) for _ in range(2))
        assert isinstance(made, LabelledTask) and isinstance(opened, LabelledTask)
        for task in (made, opened):
            assert isinstance(task.input_form, RowTokenizer)
            row = task.examples["test"].inputs[0]
            text = f"{LABELS[int(task.examples['test'].labels[0])]}"
            ids = task.input_form.backend.encode(text).ids
            assert row[: len(text)].tolist() == ids[: len(text)]
        (tmp_path / name / "tokenizer.json").write_text("{}")
        damaged = open_labelled(tmp_path / name)
        assert damaged is not None and damaged.input_form is None


def test_pictures_of_any_size_and_colour() -> None:
    from PIL import Image

    processor = HwnasImageProcessor({"height": 2, "width": 2}, 1, 16, 4.0, 2.0)
    dots = np.zeros((8, 8), "u1")
    dots[:4, :4], dots[:2, 4:] = 255, 255
    expected = (np.array([[[[16, 8], [0, 0]]]]) - 4.0) / 2.0
    grey = Image.fromarray(dots)
    for picture in (dots, dots[..., None], grey, grey.convert("RGB")):
        found = processor(picture, return_tensors="np")["pixel_values"]
        assert found.dtype == np.float32 and np.array_equal(found, expected)
    colour = HwnasImageProcessor({"height": 2, "width": 2}, 3)
    tall = np.zeros((6, 2, 3), "u1")
    tall[:3, :, 1] = 200
    values = colour([tall, Image.fromarray(tall)], return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 2, 2) and values[:, 1, 0].eq(200).all() and values.sum() == 800
    with pytest.raises(ValueError, match="as 2 axes of float64"):
        processor(dots / 255)


def test_a_processor_is_saved_with_its_code(tmp_path: Path) -> None:
    task = digits_task(tmp_path)
    folder = folder_of(random_subnet(VIT), task.input_form, "abcd", tmp_path / "net")
    modules_cache()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.save_pretrained(tmp_path / "again")
    again = transformers.AutoImageProcessor.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    assert vars(again) == vars(processor)
    assert isinstance(task.input_form, Picture)
    assert (again.image_mean, again.image_std) == (task.input_form.mean, task.input_form.deviation)


def test_families_without_a_tokenizer_have_no_files_for_it(tmp_path: Path) -> None:
    folder = folder_of(random_subnet(ENCODER), None, LABELS, tmp_path / "net")
    assert not list(folder.glob("*token*")) and not list(folder.glob("preprocessor*"))
