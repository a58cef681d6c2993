"""Gives texts and pictures to exported classifiers where none of our packages can be imported.

python foreign_inputs.py FOLDER... : in each, ``given.json`` holds texts, or names of pictures in
the folder; logits and what pipelines say of them are written to ``found.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from foreign_process import NoneOfOurs


def main(folders: Sequence[str]) -> None:
    """Load and run every folder."""
    sys.meta_path.insert(0, NoneOfOurs())
    import torch
    import transformers
    from PIL import Image

    remote = {"trust_remote_code": True}
    for folder in map(Path, folders):
        given = json.loads((folder / "given.json").read_text())
        if (folder / "preprocessor_config.json").exists():
            pictures = [Image.open(folder / name) for name in given]
            processor = transformers.AutoImageProcessor.from_pretrained(folder, **remote)
            model = transformers.AutoModelForImageClassification.from_pretrained(folder, **remote)
            inputs = processor(pictures, return_tensors="pt")
            pipe = transformers.pipeline("image-classification", model=str(folder), **remote)
            said = [pipe(str(folder / name), top_k=1)[0] for name in given]
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            auto_class = transformers.AutoModelForSequenceClassification
            model = auto_class.from_pretrained(folder, **remote)
            inputs = tokenizer(given, padding=True, truncation=True, return_tensors="pt")
            pipe = transformers.pipeline("text-classification", model=str(folder), **remote)
            said = pipe(given, truncation=True, batch_size=2)
        with torch.inference_mode():
            logits = model(**inputs).logits
        (folder / "found.json").write_text(json.dumps({"logits": logits.tolist(), "said": said}))


if __name__ == "__main__":
    main(sys.argv[1:])
