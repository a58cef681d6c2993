"""Tokenizers that came with a checkpoint, used as they are.

Source: Sennrich et al. 2016 (byte pairs); Kudo and Richardson 2018, "SentencePiece", section 3.1
(spaces as a symbol of their own); Wu et al. 2016, "Google's Neural Machine Translation System",
section 4.1 (word pieces).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray

from searchspace.errors import UserError
from searchspace.files import write_text
from searchspace.untrusted import read_small_json

END_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "[EOS]",
)  # fmt: skip
"""What the token behind a document is called, the first that there is."""
UNUSED = "<|unused_{}|>"
SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class CheckpointTokenizer:
    """Any tokenizer of Hugging Face ``tokenizers`` whose tokens stand for text.

    Args:
        backend: byte-level byte pairs, SentencePiece-like ones, or word pieces.

    Raises:
        UserError: for another kind, or one without a token that ends a text.
    """

    def __init__(self, backend: hf.Tokenizer, facts: dict[str, Any]) -> None:
        backend.no_padding()
        backend.no_truncation()
        # Text that happens to spell a special token is text.
        backend.encode_special_tokens = True
        # A token that some checkpoints have before each text is none of the text that is learnt.
        backend.post_processor = None
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.kind = _kind_of(facts)
        found = (backend.token_to_id(name) for name in END_NAMES)
        end = next((index for index in found if index is not None), None)
        if end is None:
            raise UserError(
                f"the tokenizer has no token that ends a text; one of {', '.join(END_NAMES)} is "
                "needed"
            )
        self.end_of_text: int = end
        self.end_name: str = backend.id_to_token(end) or ""
        special = {t["id"] for t in facts.get("added_tokens", ()) if t.get("special")}
        self.token_bytes = tuple(
            b"" if index in special else _bytes_of(backend.id_to_token(index) or "", self.kind)
            for index in range(self.vocab_size)
        )

    @property
    def is_lossless(self) -> bool:
        """Whether token ids give the text back, so that losses per byte have a meaning."""
        return self.kind != "word pieces"

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text cannot be written as UTF-8: {error.reason}") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, documents: Sequence[bytes]) -> NDArray[Any]:
        """See `Tokenizer.encode_documents`; uint32 where the vocabulary needs it."""
        dtype = token_dtype(self.vocab_size)
        texts = [document.decode("utf-8") for document in documents]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        rows = ([*encoding.ids, self.end_of_text] for encoding in encodings)
        return np.fromiter(chain.from_iterable(rows), dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[index] for index in ids).decode("utf-8", "replace")

    def token_id(self, name: str) -> int | None:
        """Return the id of a token; None where there is none of that name."""
        found: int | None = self._backend.token_to_id(name)
        return found

    def with_end(self) -> hf.Tokenizer:
        """Return a copy of the backend that puts `end_of_text` behind every text."""
        copy = hf.Tokenizer.from_str(self._backend.to_str())
        copy.post_processor = hf.processors.TemplateProcessing(
            single=["$A", self.end_name],
            pair=["$A", self.end_name, "$B", self.end_name],
            special_tokens=[(self.end_name, self.end_of_text)],
        )
        return copy

    def save(self, path: Path) -> None:
        """See `Tokenizer.save`."""
        write_text(path, self._backend.to_str(pretty=True) + "\n")


def read_checkpoint_tokenizer(folder: Path, name: str, vocab_size: int) -> CheckpointTokenizer:
    """Read a tokenizer file; ids that only the network has become unused tokens.

    Args:
        folder: of a checkpoint or a run.
        name: of the file in it.
        vocab_size: of the network.

    Raises:
        UserError: when it is absent, of another kind, or has more tokens than the network.
    """
    facts = read_small_json(folder, name, "tokenizer")
    path = folder / name
    if not isinstance(facts, dict):
        raise UserError(f"{path} is no tokenizer: it holds no keys")
    try:
        backend = hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the backend raises bare Exception for what it cannot parse
        raise UserError(f"{path} cannot be used as a tokenizer: {error}") from None
    missing = vocab_size - int(backend.get_vocab_size())
    if missing < 0:
        raise UserError(
            f"{path} has {vocab_size - missing} tokens, the network only {vocab_size}; it belongs "
            "to another checkpoint"
        )
    backend.add_special_tokens([UNUSED.format(index) for index in range(missing)])
    tokenizer = tokenizer_of(backend)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{path} leaves out ids below {vocab_size}; it cannot be used")
    return tokenizer


def tokenizer_of(backend: hf.Tokenizer) -> CheckpointTokenizer:
    """Return the tokenizer of a backend."""
    return CheckpointTokenizer(backend, json.loads(backend.to_str()))


def token_dtype(vocab_size: int) -> Any:
    """Return the type that token ids are stored in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _kind_of(facts: dict[str, Any]) -> str:
    """Return what tokens stand for."""
    decoder = facts.get("decoder") or {}
    steps = [decoder, *decoder.get("decoders", ())]
    kinds = {step.get("type") for step in steps}
    model = (facts.get("model") or {}).get("type")
    if model == "BPE" and "ByteLevel" in kinds:
        return "bytes"
    if model in ("BPE", "Unigram") and kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return "sentence pieces"
    if model == "WordPiece":
        return "word pieces"
    raise UserError(
        f"this is not a byte-level tokenizer, nor one of SentencePiece or word pieces, but {model} "
        f"with a decoder of {', '.join(sorted(map(str, kinds)))}; give one of these"
    )


def _bytes_of(name: str, kind: str) -> bytes:
    """Return what a token stands for."""
    if kind == "bytes":
        table = byte_of_char()
        # Added tokens are spelt as they are.
        return bytes(table[c] for c in name) if set(name) <= table.keys() else name.encode()
    if kind == "word pieces":
        return name.removeprefix("##").encode()
    match = _BYTE.fullmatch(name)
    return bytes([int(match[1], 16)]) if match else name.replace(SPACE, " ").encode()


@functools.cache
def byte_of_char() -> dict[str, int]:
    """Return which byte each printable stand-in of byte-level tokenizers means (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    chars = {chr(value): value for value in printable}
    return chars | {chr(256 + index): value for index, value in enumerate(others)}
