"""How a person's text or picture becomes an input of a classifier, wherever it is deployed.

Legend: T tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray

from searchspace.files import write_text

PAD_NAME = "[PAD]"


@dataclass(frozen=True)
class RowTokenizer:
    """Text to token ids (T,), as Hugging Face ``tokenizers`` does it; long texts are cut at T.

    Args:
        backend: gives the ids, with what always stands behind a text.
        pad: id of the token that fills up shorter texts, behind them.
    """

    backend: hf.Tokenizer
    pad: int

    @property
    def pad_name(self) -> str:
        """How the token for padding is spelt."""
        return str(self.backend.id_to_token(self.pad))

    def save(self, path: Path) -> None:
        """Write the backend as one JSON file."""
        write_text(path, self.backend.to_str(pretty=True) + "\n")

    @staticmethod
    def read(path: Path, pad: int) -> RowTokenizer | None:
        """Return what `save` wrote; None where there is no such file, or a damaged one."""
        try:
            backend = hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception:  # the backend raises bare Exception for what it cannot parse
            return None
        return RowTokenizer(backend, pad) if backend.id_to_token(pad) else None


@dataclass(frozen=True)
class Picture:
    """A picture to an image (C, H, W), float32: its pixels are averaged, rounded and scaled.

    Args:
        size: H and W in pixels.
        channels: C; 1 for grey, 3 for colour.
        white: what full brightness counts; black is 0, and all is rounded to whole numbers.
        mean: is subtracted.
        deviation: is divided by, after that.
    """

    size: int
    channels: int
    white: int
    mean: float
    deviation: float

    def scaled(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return pixels from 0 to `white`, of any shape, as networks want them."""
        return ((pixels - self.mean) / self.deviation).astype(np.float32)


InputForm = RowTokenizer | Picture


def byte_backend(last: str) -> hf.Tokenizer:
    """Return a tokenizer with a token per byte and a special one as token 256.

    Args:
        last: name of the special token.
    """
    # Bytes that cannot be printed stand for characters above all bytes, in their order.
    chars = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    unprintable = [byte for byte in range(256) if chr(byte) not in chars]
    vocabulary = {char: ord(char) for char in chars if ord(char) < 256}
    vocabulary |= dict(zip((char for char in chars if ord(char) > 255), unprintable, strict=True))
    backend = hf.Tokenizer(hf.models.BPE(vocabulary, []))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.add_special_tokens([last])
    return backend


def symbol_backend(names: Sequence[str], pattern: str) -> hf.Tokenizer:
    """Return a tokenizer of symbols; space between them may be left out, round brackets count none.

    Args:
        names: of the symbols in order of their ids; `PAD_NAME` comes behind them.
        pattern: a regular expression that matches every one of them.
    """
    backend = hf.Tokenizer(hf.models.WordLevel({n: i for i, n in enumerate([*names, PAD_NAME])}))
    backend.normalizer = hf.normalizers.Replace(hf.Regex("[()]"), " ")
    backend.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
            hf.pre_tokenizers.WhitespaceSplit(),
        ]
    )
    backend.add_special_tokens([PAD_NAME])
    return backend
