"""Which network drafts for which."""

from __future__ import annotations

from pathlib import Path

from nas.tasks.tokenizers import TOKENIZER_FILE
from searchspace.errors import UserError
from searchspace.subnet import Subnet


def find_draft(folder: Path, draft: str) -> Path:
    """Return the folder that `draft` names: a folder, or the id of an arch exported beside it.

    Raises:
        UserError: when it is neither.
    """
    for path in (Path(draft), folder.resolve().parent / draft):
        if (path / "config.json").is_file():
            return path
    beside = folder.resolve().parent.glob("*/model.safetensors")
    names = sorted(path.parent.name for path in beside if path.parent.name != folder.name)
    known = f"; beside {folder} there are {', '.join(names)}" if names else ""
    raise UserError(f"draft {draft!r} is neither an exported folder nor an arch id{known}")


def check_pair(target: Subnet, draft: Subnet) -> None:
    """Raise a `UserError` unless one network can draft for the other."""
    kind = draft.arch.family.kind
    if not draft.arch.family.causal:
        raise UserError(f"the draft is a network of family {kind!r}; only a decoder can draft")
    if draft.arch.vocab_size != target.arch.vocab_size:
        raise UserError(
            f"the draft knows {draft.arch.vocab_size} tokens and the target "
            f"{target.arch.vocab_size}; take two networks of the same run"
        )


def check_tokenizers(target: Path, draft: Path) -> None:
    """Raise a `UserError` unless both folders have the same tokenizer."""
    texts = [
        path.read_text(encoding="utf-8") if path.exists() else ""
        for path in (target / TOKENIZER_FILE, draft / TOKENIZER_FILE)
    ]
    if texts[0] != texts[1]:
        raise UserError(
            f"{draft} and {target} have different tokenizers, so a token means something else to "
            "each; take two networks of the same run"
        )
