"""A tokenizer as `AutoTokenizer` reads it."""

from __future__ import annotations

from pathlib import Path

from nas.tasks.input_forms import byte_backend
from nas.tasks.tokenizers import END_OF_TEXT, TOKENIZER_FILE, ByteTokenizer, Tokenizer
from searchspace.files import write_json, write_text


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    `nas.tasks.tokenizers.load_tokenizer` reads the folder too, and gives the same ids. Plain bytes
    become byte pairs without a merge.

    Args:
        tokenizer: of a text task.
        folder: of the model.
        max_tokens: what transformers shortens text to when asked to truncate.
    """
    if isinstance(tokenizer, ByteTokenizer):
        write_text(folder / TOKENIZER_FILE, byte_backend(END_OF_TEXT).to_str(pretty=True) + "\n")
    else:
        tokenizer.save(folder / TOKENIZER_FILE)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.end_name,
        "eos_token": tokenizer.end_name,
        "pad_token": tokenizer.end_name,
        "padding_side": "left",
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Text that happens to spell the end's name is text, not the end of it.
        "split_special_tokens": True,
    }
    write_json(folder / "tokenizer_config.json", facts)
