"""Who is learnt from and who is held out.

Files are held out whole: an order by the hash of their names (the same on every machine) fills
the test part, then the validation part, and the rest is learnt from. A file whose content was
already seen is left out, so nothing learnt is found again in a held-out part. One file, or files
too few or too large for that, are each cut into contiguous blocks instead: training head,
validation, test tail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from nas.tasks.config import TaskConfig
from nas.tasks.readers import NotReadable, Reader
from nas.tasks.sources import SourceFile
from searchspace.errors import UserError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

# A held-out part may become this much larger or smaller than asked for before files are cut.
_MOST, _LEAST = 1.5, 0.5
# A held-out part is not to be one or two large files, unless there are no others.
_LARGEST_FILE = 0.25


@dataclass
class Part:
    """The documents of one split, with the names of the files that they come from."""

    names: list[str] = field(default_factory=list)
    documents: list[bytes] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, name: str, document: bytes) -> None:
        """Append one document, unless it is empty."""
        if document:
            self.names.append(name)
            self.documents.append(document)
            self.num_bytes += len(document)


@dataclass(frozen=True)
class Corpus:
    """All documents of a task.

    Args:
        parts: documents by split.
        rule: ``"files"`` where whole files are held out, ``"blocks"`` where files were cut.
        num_skipped_files: files left out because they are not text or cannot be read.
        num_duplicate_files: files left out because another one has the same content.
        num_bytes: bytes of all files that could be used.
        files_sha256: hash over the names of the files used, their splits and their contents.
    """

    parts: dict[SplitName, Part]
    rule: Literal["files", "blocks"]
    num_skipped_files: int
    num_duplicate_files: int
    num_bytes: int
    files_sha256: str


def split_files(
    files: list[SourceFile],
    config: TaskConfig,
    reader: Reader,
    progress: Callable[[str], None],
) -> Corpus:
    """Read files and divide them into training, validation and test documents.

    Args:
        files: the files that match, in any order.
        config: the fractions, ``max_train_bytes`` and ``seed``.
        reader: how a file is checked, read and cut.
        progress: is told how many files are left out.

    Raises:
        UserError: the only file, or every file, cannot be read as what it should be.
    """
    splitter = _Splitter(config, reader)
    usable = splitter.usable(files)
    parts = splitter.by_file(usable)
    rule: Literal["files", "blocks"] = "files"
    if parts is None:
        rule, parts = "blocks", splitter.by_block(usable)
    skipped = splitter.skipped
    if len(skipped) == len(files):
        file, reason = next(iter(skipped.items()))
        if len(files) == 1:
            raise UserError(f"{file.path} {reason}; give {reader.kind}")
        raise UserError(
            f"none of the {len(files)} files that match can be used, for example {file.path} "
            f"{reason}; give {reader.kind}"
        )
    if skipped:
        progress(f"skipped {len(skipped)} of {len(files)} files that are not {reader.kind}")
    num_bytes = sum(file.num_bytes for file in usable if file not in skipped)
    duplicates = len(splitter.duplicates) if rule == "files" else 0
    return Corpus(parts, rule, len(skipped), duplicates, num_bytes, _fingerprint(parts))


class _Splitter:
    """Reads files once each and remembers which could not be read and which came twice."""

    def __init__(self, config: TaskConfig, reader: Reader) -> None:
        self.config = config
        self.reader = reader
        self.skipped: dict[SourceFile, str] = {}
        self.duplicates: set[SourceFile] = set()
        self._seen: set[bytes] = set()

    def usable(self, files: list[SourceFile]) -> list[SourceFile]:
        """Leave out what is seen at a glance to be of another kind."""
        for file in files:
            try:
                self.reader.sniff(file)
            except NotReadable as reason:
                self.skipped[file] = str(reason)
        return [file for file in files if file.num_bytes and file not in self.skipped]

    def by_file(self, files: list[SourceFile]) -> dict[SplitName, Part] | None:
        """Hold out whole files; None where that gives parts far from the sizes asked for."""
        if len(files) < 3:
            return None
        config = self.config
        total = self._total_bytes(files)
        wanted: dict[SplitName, float] = {
            "test": config.test_fraction * total,
            "validation": config.validation_fraction * total,
        }
        parts: dict[SplitName, Part] = {name: Part() for name in SPLITS}
        left = sorted(files, key=lambda file: name_digest(file.name))
        for split, size in wanted.items():
            small = [file for file in left if file.num_bytes <= _LARGEST_FILE * size]
            large = [file for file in left if file.num_bytes > _LARGEST_FILE * size]
            left = self._fill(parts[split], small, size, _MOST * size)
            left += self._fill(parts[split], large, size, _MOST * size)
            left.sort(key=lambda file: name_digest(file.name))
        left.sort(key=lambda file: name_digest(f"{config.seed}/{file.name}"))
        self._fill(parts["train"], left, config.max_train_bytes, config.max_train_bytes)
        no_use = self.duplicates | self.skipped.keys()
        size_left = sum(file.num_bytes for file in left if file not in no_use)
        wanted["train"] = min(config.max_train_bytes, size_left)
        enough = all(parts[split].num_bytes >= _LEAST * size for split, size in wanted.items())
        return parts if enough else None

    def by_block(self, files: list[SourceFile]) -> dict[SplitName, Part]:
        """Cut every file into a training head, a validation block and a test tail."""
        config = self.config
        share = self._total_bytes(files) / max(sum(file.num_bytes for file in files), 1)
        parts: dict[SplitName, Part] = {name: Part() for name in SPLITS}
        for file in files:
            size = file.num_bytes
            test = size * (1 - share * config.test_fraction)
            validation = test - size * share * config.validation_fraction
            train = size * share * (1 - config.test_fraction - config.validation_fraction)
            try:
                cuts = [self.reader.align(file, round(at)) for at in (train, validation, test)]
                # Rounding must not let the training head reach into the validation block.
                edges = [(0, min(cuts[:2])), (cuts[1], cuts[2]), (cuts[2], size)]
                blocks = [self.reader.read(file, *edge) for edge in edges]
            except NotReadable as reason:
                self.skipped[file] = str(reason)
                continue
            for split, block in zip(SPLITS, blocks, strict=True):
                parts[split].add(file.name, block)
        return parts

    def _total_bytes(self, files: list[SourceFile]) -> float:
        """Bytes to be used of all there are, held-out parts included."""
        held_out = self.config.validation_fraction + self.config.test_fraction
        return min(
            float(sum(file.num_bytes for file in files)),
            self.config.max_train_bytes / (1 - held_out),
        )

    def _fill(
        self, part: Part, files: list[SourceFile], enough: float, at_most: float
    ) -> list[SourceFile]:
        """Move files into a part until it has enough bytes; returns the files not looked at."""
        left = []
        for file in files:
            if part.num_bytes >= enough or part.num_bytes + file.num_bytes > at_most:
                left.append(file)
                continue
            try:
                document = self.reader.read(file)
            except NotReadable as reason:
                self.skipped[file] = str(reason)
                continue
            digest = hashlib.sha256(document).digest()
            if digest in self._seen:
                self.duplicates.add(file)
                continue
            self._seen.add(digest)
            part.add(file.name, document)
        return left


def name_digest(name: str) -> bytes:
    """Return what files are ordered by: fixed, the same on every machine, and as good as random."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _fingerprint(parts: dict[SplitName, Part]) -> str:
    total = hashlib.sha256()
    for split in SPLITS:
        part = parts[split]
        for name, document in sorted(zip(part.names, part.documents, strict=True)):
            total.update(
                f"{split}/".encode() + name_digest(name) + hashlib.sha256(document).digest()
            )
    return total.hexdigest()
