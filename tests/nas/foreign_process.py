"""Loads exported folders where none of our packages can be imported.

python foreign_process.py FOLDER... : in each, logits of `inputs` in ``given.safetensors`` are
written to ``found.safetensors``.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = {"nas", "nas_kernels", "searchspace", "hw_profiles", "predictors"}


class NoneOfOurs(importlib.abc.MetaPathFinder):
    """Raises for our packages, even where they are installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """See `importlib`."""
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} must not be needed")


def main(folders: Sequence[str]) -> None:
    """Load and run every folder."""
    sys.meta_path.insert(0, NoneOfOurs())
    import json

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    for folder in map(Path, folders):
        auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
        classes = [name for name in auto_map if name.startswith("AutoModel")]
        auto_class = getattr(transformers, classes[0] if classes else "AutoModelForCausalLM")
        model = auto_class.from_pretrained(folder, trust_remote_code=bool(classes))
        inputs = load_file(folder / "given.safetensors")["inputs"]
        with torch.inference_mode():
            logits = model(inputs).logits
        save_file({"logits": logits.contiguous()}, folder / "found.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
