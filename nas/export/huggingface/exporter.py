"""The ``hf`` format: a folder that both transformers and `Subnet.load` read."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.export.base import ExportFailed, Handover, Loaded, Session, WeightsAsStored
from nas.export.huggingface.bundle import bundle
from nas.export.huggingface.config_keys import (
    CLASSES,
    MODELING_FILE,
    config_keys,
    registries_used,
)
from nas.export.huggingface.input_files import save_input_form
from nas.export.huggingface.tokenizer_files import save_tokenizer
from searchspace.files import read_json, write_json, write_text
from searchspace.subnet import Subnet

ROOT = "nas.export.huggingface.modeling_hwnas"


class HuggingFaceExporter(WeightsAsStored):
    """The subnetwork's own checkpoint, which `AutoModelFor...` loads with ``trust_remote_code``."""

    name = "hf"
    summary = "a Hugging Face folder with its own code"
    folder = ""
    max_difference = 1e-5

    def missing(self) -> str:
        """Return an empty text: nothing else is needed to write it."""
        return ""

    def refusal(self, handover: Handover) -> str:
        """Return an empty text: every network has this form."""
        return ""

    def write(self, handover: Handover, folder: Path) -> Mapping[str, Any]:
        """Write weights, config, code and tokenizer; see `Exporter.write`."""
        keys = config_keys(handover)
        facts = {"task": dict(handover.task), "torch_version": torch.__version__}
        handover.subnet.save(folder, {**keys, **facts})
        try:
            files = bundle(ROOT, MODELING_FILE, registries_used(handover))
        except ValueError as error:
            raise ExportFailed(f"the network's code cannot be copied: {error}") from error
        for name, text in files.items():
            write_text(folder / name, text)
        special = {name: value for name, value in keys.items() if name.endswith("_token_id")}
        if handover.arch.family.causal:
            write_json(folder / "generation_config.json", special)
        if handover.tokenizer is not None:
            save_tokenizer(handover.tokenizer, folder, int(handover.task["seq_len"]))
        if handover.input_form is not None:
            save_input_form(handover.input_form, folder, int(handover.task["seq_len"]))
        return {"loaded_with": _loader(handover.arch.family.kind)}

    def load(self, folder: Path) -> Loaded:
        """Return the network as transformers loads it, else as we do; see `Exporter.load`."""
        if not has_transformers():
            return LoadedSubnet(Subnet.load(folder))
        return LoadedModel(load_model(folder))


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def _loader(kind: str) -> str:
    return CLASSES[kind][0] if has_transformers() else "Subnet.load"


def load_model(folder: Path, **options: Any) -> Any:
    """Return a folder's model, its code taken from the folder alone.

    Args:
        folder: that `HuggingFaceExporter` or the model's `save_pretrained` wrote.
        options: of `from_pretrained`.

    Raises:
        UserError: when there is no config.
    """
    modules_cache()
    import transformers

    auto_map = read_json(folder / "config.json", "model config")["auto_map"]
    auto_class = next(name for name, _ in CLASSES.values() if name in auto_map)
    options = {"trust_remote_code": True, "local_files_only": True, **options}
    return getattr(transformers, auto_class).from_pretrained(folder, **options).eval()


@functools.cache
def modules_cache() -> Path:
    """Let transformers copy models' code to a folder that goes with this process.

    Its usual place is in the user's home, where it would stay.
    """
    folder = tempfile.mkdtemp(prefix="hwnas-modules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dynamic_modules = importlib.import_module("transformers.dynamic_module_utils")
    dynamic_modules.HF_MODULES_CACHE = folder  # type: ignore[attr-defined]
    dynamic_modules.init_hf_modules()
    # In front of such a folder of a process that started this one and handed on its path.
    sys.path.remove(folder)
    sys.path.insert(0, folder)
    package = sys.modules.get(dynamic_modules.TRANSFORMERS_DYNAMIC_MODULE_NAME)
    if package is not None:
        # Something was loaded from the usual place before: let its package span both.
        package.__path__.append(f"{folder}/{package.__name__}")
    return Path(folder)


class LoadedSubnet:
    """A subnetwork in PyTorch."""

    def __init__(self, subnet: Subnet) -> None:
        self.subnet = subnet

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        out: Tensor = self.subnet(inputs)
        return out

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        state = self.subnet.init_state(batch, max_tokens)
        return lambda tokens_BT: self.subnet(tokens_BT, state)


class LoadedModel:
    """A model of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits; see `Loaded.logits`."""
        options = {"use_cache": False} if inputs.ndim == 2 and self.model.can_generate() else {}
        out: Tensor = self.model(inputs, **options).logits
        return out.float()

    def session(self, batch: int, max_tokens: int) -> Session:
        """Return what continues sequences; see `Loaded.session`."""
        past = self.model.new_cache(max_tokens)
        return lambda tokens_BT: self.model(tokens_BT, past_key_values=past).logits.float()
