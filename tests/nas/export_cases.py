"""Networks to export, and folders of them, for the tests of export formats."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.export.base import Exporter, Handover
from nas.tasks.tokenizers import ByteTokenizer
from searchspace.arch import Arch, LayerArch
from searchspace.ends import example_inputs
from searchspace.family import Family
from searchspace.norms import Norm
from searchspace.rewrites import rewrite
from searchspace.subnet import Subnet

VOCAB = 257


def random_subnet(arch: Arch, seed: int = 0, rewrites: Sequence[str] = ()) -> Subnet:
    """A packed network, no value of which is at its usual start."""
    generator = torch.Generator().manual_seed(seed)
    subnet = Subnet(arch).reset(generator)
    for module in subnet.modules():
        if isinstance(module, Norm):
            module.reset()
    with torch.no_grad():
        for parameter in subnet.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise * parameter.std(correction=0).clamp_min(0.2)
    for name in rewrites:
        rewrite(subnet, name)
    return subnet.pack().eval().requires_grad_(False)


def handover(arch: Arch, seed: int = 0, rewrites: tuple[str, ...] = ()) -> Handover:
    """What an exporter is given; decoders of bytes have a tokenizer."""
    task = {"unit": "byte", "vocab_size": arch.vocab_size, "seq_len": 64}
    if arch.family.num_classes:
        task["classes"] = [f"class {i}" for i in range(arch.family.num_classes)]
    is_text = arch.family.causal and arch.vocab_size == VOCAB
    tokenizer = ByteTokenizer() if is_text else None
    return Handover(random_subnet(arch, seed, rewrites), task, tokenizer, rewrites)


def inputs_of(arch: Arch, batch: int = 3, tokens: int = 11, seed: int = 1) -> Tensor:
    """Random inputs."""
    return example_inputs(arch.ends, batch, tokens, torch.Generator().manual_seed(seed))


def write(exporter: Exporter, given: Handover, folder: Path) -> Path:
    """Write a folder, and the inputs that `run_elsewhere` runs."""
    folder.mkdir(parents=True)
    exporter.write(given, folder)
    inputs = inputs_of(given.arch)
    save_file({"inputs": inputs}, folder / "given.safetensors")
    return folder


def run_elsewhere(folders: Sequence[Path], home: Path) -> list[Tensor]:
    """Return the logits of folders, computed by a process that has none of our packages."""
    script = Path(__file__).with_name("foreign_process.py")
    settings = {"PYTHONPATH": "", "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, folders)],
        cwd=home, env={**os.environ, **settings}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [load_file(folder / "found.safetensors")["logits"] for folder in folders]


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit where that is above 1."""
    difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    return float(difference.detach())


def _softmax(heads: int, kv_heads: int, width: int, **others: object) -> LayerArch:
    values = {"mixer": "softmax", "num_heads": heads, "num_kv_heads": kv_heads, "position": "rope"}
    ffn = {"ffn": "swiglu", "intermediate_size": width} if width else {}
    return LayerArch(**{**values, **ffn, **others})  # type: ignore[arg-type]


LLAMA = Arch(
    32,
    8,
    VOCAB,
    (
        _softmax(4, 2, 48),
        LayerArch(ffn="swiglu", intermediate_size=16),
        LayerArch(),
        _softmax(2, 1, 0),
        _softmax(2, 2, 40),
    ),
)
GATED = Arch(
    32,
    8,
    VOCAB,
    (
        LayerArch(mixer="gla", num_heads=4, num_kv_heads=2, ffn="relu2", intermediate_size=48),
        LayerArch(
            mixer="qrnn",
            num_heads=2,
            num_kv_heads=2,
            ffn="rwkv_channelmix",
            intermediate_size=24,
            norm="layernorm",
        ),
        _softmax(4, 1, 16),
    ),
)
LOW_BIT = Arch(
    64,
    16,
    VOCAB,
    tuple(
        _softmax(4, 2, 64, mixer_precision=mixer, ffn_precision=ffn)
        for mixer, ffn in (("int8", "int4"), ("ternary", "bf16"), ("int8_weight", "int8"))
    ),
)
ENCODER = Arch(
    32,
    8,
    40,
    (
        _softmax(4, 4, 48, norm="prepbn", ffn="gelu"),
        LayerArch(mixer="fourier", ffn="gelu", intermediate_size=16, norm="layernorm"),
    ),
    Family("encoder", 3, embedding_position="learned", max_tokens=16, pad_token=39),
)
VIT = Arch(
    32,
    8,
    0,
    (
        _softmax(4, 2, 48, norm="unified_norm", position="nope"),
        LayerArch(),
        LayerArch(mixer="pool", ffn="gelu", intermediate_size=16, norm="layernorm"),
    ),
    Family(
        "vit", 4, "class_token", "learned", image_size=8, channels=1, patch_size=2,
        final_norm="layernorm",
    ),
)  # fmt: skip
CASES = {
    "llama": LLAMA,
    "gated": GATED,
    "low_bit": LOW_BIT,
    "encoder": ENCODER,
    "vit": VIT,
}
