"""A tokenizer as `AutoTokenizer` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        write_text(folder / TOKENIZER_FILE, _byte_backend().to_str(pretty=True) + "\n")
    else:
        tokenizer.save(folder / TOKENIZER_FILE)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.end_name,
        "eos_token": tokenizer.end_name,
        "pad_token": tokenizer.end_name,
        "padding_side": "left",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        # Text that happens to spell the end's name is text, not the end of it.
        "split_special_tokens": True,
    }
    write_json(folder / "tokenizer_config.json", facts)


def _byte_backend() -> Any:
    """Return a tokenizer of Hugging Face with a token per byte and end-of-text as token 256."""
    import tokenizers as hf

    # Bytes that cannot be printed stand for characters above all bytes, in their order.
    chars = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    unprintable = [byte for byte in range(256) if chr(byte) not in chars]
    vocabulary = {char: ord(char) for char in chars if ord(char) < 256}
    vocabulary |= dict(zip((char for char in chars if ord(char) > 255), unprintable, strict=True))
    backend = hf.Tokenizer(hf.models.BPE(vocabulary, []))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend
