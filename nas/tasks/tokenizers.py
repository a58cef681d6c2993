"""Text to token ids and back: byte pairs or plain bytes, both lossless.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units",
section 3.2 (byte-pair encoding); Radford et al. 2019, section 2.2 (over bytes).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray

from nas.tasks.checkpoint_tokenizer import byte_of_char, tokenizer_of
from nas.tasks.pieces import batches, sample
from searchspace.errors import UserError
from searchspace.files import write_text

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"

# Words are cut before they are merged. A line's closing punctuation, its end, blank lines and the
# next line's indentation are one piece, so ":\n        " can become one token; on Python sources
# that is 3% fewer tokens than GPT-2's pattern, which leaves the last space to the next word.
_WORDS = (
    r" ?[^\s\p{L}\p{N}]*(?:\r?\n)+[ \t]*"
    r"|[^\s\p{L}\p{N}]\p{L}+| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+"
    r"|[^\S\r\n]+|\s"
)
# The same words of ASCII text; Python's `re` and a memory of words need half the time.
_ASCII_WORDS = re.compile(
    r" ?[^\sA-Za-z0-9]*(?:\r?\n)+[ \t]*"
    r"|[^\sA-Za-z0-9][A-Za-z]+| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+"
    r"|[^\S\r\n]+|\s",
    re.ASCII,
)
_MAX_WORDS = 200_000


class Tokenizer(Protocol):
    """What the rest of the package may ask of a tokenizer."""

    vocab_size: int
    end_of_text: int
    end_name: str
    token_bytes: tuple[bytes, ...]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end-of-text token."""

    def encode_documents(self, documents: Sequence[bytes]) -> NDArray[Any]:
        """Return the ids of UTF-8 documents in one row, end-of-text behind each document.

        They are uint16, or uint32 where the vocabulary needs it.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; end-of-text stands for nothing."""

    def save(self, path: Path) -> None:
        """Write the tokenizer as one JSON file."""


class _Decoding:
    """Decoding, which follows from the bytes of each token alone."""

    token_bytes: tuple[bytes, ...]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[index] for index in ids).decode("utf-8", "replace")


class ByteTokenizer(_Decoding):
    """One token per UTF-8 byte, and end-of-text as token 256."""

    vocab_size = 257
    end_of_text = 256
    end_name = END_OF_TEXT
    token_bytes = (*(bytes([value]) for value in range(256)), b"")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(_utf8(text))

    def encode_documents(self, documents: Sequence[bytes]) -> NDArray[np.uint16]:
        """See `Tokenizer.encode_documents`."""
        ends = np.cumsum([len(document) + 1 for document in documents])
        ids = np.full(int(ends[-1]) if len(ends) else 0, self.end_of_text, np.uint16)
        for end, document in zip(ends, documents, strict=True):
            ids[end - 1 - len(document) : end - 1] = np.frombuffer(document, np.uint8)
        return ids

    def save(self, path: Path) -> None:
        """See `Tokenizer.save`."""
        facts = {"kind": "bytes", "vocab_size": 257, "end_of_text": 256}
        write_text(path, json.dumps(facts, indent=2) + "\n")


class BytePairTokenizer(_Decoding):
    """Byte-level byte pairs through Hugging Face ``tokenizers``; the file is in their format.

    Args:
        backend: a byte-level tokenizer with the special token ``<|endoftext|>``.

    Raises:
        UserError: the backend is another kind of tokenizer.
    """

    end_name = END_OF_TEXT

    def __init__(self, backend: hf.Tokenizer) -> None:
        end_of_text = backend.token_to_id(END_OF_TEXT)
        self.vocab_size: int = backend.get_vocab_size()
        names = [backend.id_to_token(index) or "" for index in range(self.vocab_size)]
        alphabet = byte_of_char()
        if end_of_text is None or not alphabet.keys() <= set(names):
            raise UserError(
                f"this is not a byte-level tokenizer with the token {END_OF_TEXT}; use the "
                f"{TOKENIZER_FILE} that a task wrote"
            )
        self.end_of_text: int = end_of_text
        self.token_bytes = tuple(
            b"" if index == end_of_text else bytes(alphabet[char] for char in name)
            for index, name in enumerate(names)
        )
        # Text that happens to spell <|endoftext|> is text, not the end of it.
        backend.encode_special_tokens = True
        self._backend = backend
        self._ids_of_word: dict[str, list[int]] = {}

    @classmethod
    def train(cls, documents: Sequence[bytes], vocab_size: int) -> BytePairTokenizer:
        """Learn merges from UTF-8 documents; the same documents always give the same ones.

        Args:
            documents: what to learn from; of more than 4 MB, evenly spread pieces are taken.
            vocab_size: tokens wanted, end-of-text included; a short text may give fewer.
        """
        backend = hf.Tokenizer(hf.models.BPE())
        backend.pre_tokenizer = hf.pre_tokenizers.Sequence(
            [
                hf.pre_tokenizers.Split(hf.Regex(_WORDS), "isolated"),
                hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = hf.decoders.ByteLevel()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        backend.train_from_iterator(sample(documents), trainer)
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        _utf8(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, documents: Sequence[bytes]) -> NDArray[np.uint16]:
        """See `Tokenizer.encode_documents`."""
        rows = [np.empty(0, np.uint16)]
        for batch in batches(documents):
            for (_, is_last), ids in zip(batch, self._encode_many(batch), strict=True):
                rows.append(np.array([*ids, self.end_of_text] if is_last else ids, np.uint16))
        return np.concatenate(rows)

    def _encode_many(self, batch: list[tuple[str, bool]]) -> list[list[int]]:
        """Return the ids of each piece, those of ASCII pieces word by word."""
        words_of = {
            index: _ASCII_WORDS.findall(piece)
            for index, (piece, _) in enumerate(batch)
            if piece.isascii()
        }
        if len(self._ids_of_word) > _MAX_WORDS:
            self._ids_of_word.clear()
        known = self._ids_of_word
        new = list({word for words in words_of.values() for word in words if word not in known})
        others = [piece for index, (piece, _) in enumerate(batch) if index not in words_of]
        encodings = self._backend.encode_batch_fast([*new, *others], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        known.update(zip(new, ids, strict=False))
        rest = iter(ids[len(new) :])
        return [
            list(chain.from_iterable(map(known.__getitem__, words_of[index])))
            if index in words_of
            else next(rest)
            for index in range(len(batch))
        ]

    def save(self, path: Path) -> None:
        """See `Tokenizer.save`."""
        write_text(path, self._backend.to_str(pretty=True) + "\n")


class StreamDecoder:
    """Turns token ids into text one by one and never gives out half a character.

    Args:
        tokenizer: whose ids will be pushed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._end_of_text = tokenizer.end_of_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes, perhaps none.

        End-of-text gives out what was left as `finish` does.
        """
        is_end = token_id == self._end_of_text
        return self._decoder.decode(self._token_bytes[token_id], final=is_end)

    def finish(self) -> str:
        """Return U+FFFD if the last character never became complete, else nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the ``tokenizer.json`` of a task folder or of an exported subnet.

    One that a task learnt cuts words in its own way; any other is used as it is.

    Raises:
        UserError: the folder holds no such file, or one that is damaged or of another kind.
    """
    path = Path(folder) / TOKENIZER_FILE
    try:
        text = path.read_text(encoding="utf-8")
        facts: Any = json.loads(text)
        if isinstance(facts, dict) and facts.get("kind") == "bytes":
            return ByteTokenizer()
        backend = hf.Tokenizer.from_str(text)
        return BytePairTokenizer(backend) if _is_own(facts) else tokenizer_of(backend)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {TOKENIZER_FILE}; give a folder that a task or an export wrote"
        ) from None
    except Exception as error:  # the backend raises bare Exception for what it cannot parse
        raise UserError(f"{path} cannot be used as a tokenizer: {error}") from error


def _is_own(facts: Any) -> bool:
    """Whether a tokenizer cuts words as those do that tasks learn."""
    before = facts.get("pre_tokenizer") if isinstance(facts, dict) else None
    steps = before.get("pretokenizers") if isinstance(before, dict) else None
    first = steps[0] if isinstance(steps, list) and steps else {}
    return isinstance(first, dict) and first.get("pattern") == {"Regex": _WORDS}


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds U+{ord(text[error.start]):04X} at position {error.start}, half of a "
            "surrogate pair, which UTF-8 cannot hold; remove it"
        ) from None
