"""What `AutoTokenizer` and `AutoImageProcessor` read in a classifier's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.export.huggingface.bundle import bundle
from nas.tasks.input_forms import InputForm, Picture, RowTokenizer
from nas.tasks.tokenizers import TOKENIZER_FILE
from searchspace.files import write_json, write_text

PROCESSING_FILE, PROCESSOR = "image_processing_hwnas", "HwnasImageProcessor"
ROOT = f"nas.export.huggingface.{PROCESSING_FILE}"


def save_input_form(form: InputForm, folder: Path, max_tokens: int) -> None:
    """Write how a text or a picture becomes an input.

    Args:
        form: of the task.
        folder: of the model.
        max_tokens: what transformers shortens text to when asked to truncate.
    """
    if isinstance(form, RowTokenizer):
        form.save(folder / TOKENIZER_FILE)
        write_json(folder / "tokenizer_config.json", _tokenizer_config(form, max_tokens))
        return
    for name, text in bundle(ROOT, PROCESSING_FILE, {}).items():
        write_text(folder / name, text)
    write_json(folder / "preprocessor_config.json", _processor_config(form))


def _tokenizer_config(form: RowTokenizer, max_tokens: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": form.pad_name,
        "padding_side": "right",
        "truncation_side": "right",
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Text that happens to spell a special token's name is text.
        "split_special_tokens": True,
    }


def _processor_config(form: Picture) -> dict[str, Any]:
    return {
        "image_processor_type": PROCESSOR,
        "auto_map": {"AutoImageProcessor": f"{PROCESSING_FILE}.{PROCESSOR}"},
        "size": {"height": form.size, "width": form.size},
        "num_channels": form.channels,
        "white": form.white,
        "image_mean": form.mean,
        "image_std": form.deviation,
    }
