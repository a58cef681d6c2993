"""Tiny checkpoints that transformers makes, with a tokenizer, for the tests of the import."""

from __future__ import annotations

import sysconfig
import warnings
from pathlib import Path
from typing import Any

import tokenizers as hf
import torch
from torch.nn import functional as F

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
BERT_SIZES = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama_tied": (
        "Llama",
        {**SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
         "rms_norm_eps": 1e-5, "head_dim": 12, "rope_theta": 500_000.0},
    ),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 16}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "gpt2": ("GPT2", GPT2_SIZES),
    "bert": ("Bert", {**BERT_SIZES, "num_labels": 3}),
}  # fmt: skip
"""By name the prefix of the classes in transformers, and the config."""


def model_of(kind: str, **changes: Any) -> Any:
    """Return an untrained model whose biases and scales are uneven."""
    import transformers

    prefix, values = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**{**values, **changes})
    suffix = {"Bert": "ForSequenceClassification", "GPT2": "LMHeadModel"}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = getattr(transformers, prefix + suffix.get(prefix, "ForCausalLM"))(config)
        for param in model.parameters():
            noise = torch.randn(param.shape)
            param.data += noise * (0.2 if param.ndim == 1 else 0.05)
    return model.eval()


def save_checkpoint(kind: str, folder: Path, **changes: Any) -> Path:
    """Write a checkpoint with a tokenizer; returns its folder."""
    model_of(kind, **changes).save_pretrained(folder)
    (word_pieces() if kind == "bert" else byte_pairs()).save(str(folder / "tokenizer.json"))
    return folder


def train_llama(folder: Path, steps: int) -> float:
    """Write a small Llama that has learnt a little of Python; returns its last loss."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:100]
    texts = [path.read_text("utf-8", errors="ignore") for path in files]
    tokenizer = byte_pairs(texts[:40], 512)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = torch.tensor([i for found in tokenizer.encode_batch(texts) for i in found.ids])
    sizes = {"vocab_size": 520, "hidden_size": 64, "intermediate_size": 192}
    model = model_of("llama", **sizes, num_hidden_layers=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(ids) - 65, (16,), generator=generator)
        windows = torch.stack([ids[start : start + 65] for start in starts])
        logits = model(windows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return loss.item()


def byte_pairs(texts: list[str] | None = None, vocab_size: int = 280) -> hf.Tokenizer:
    """Return a byte-level tokenizer as those of GPT-2 and Qwen."""
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts or ["def the end of the line"], trainer)
    return backend


def word_pieces() -> hf.Tokenizer:
    """Return a tokenizer as those of BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;()_=\"'"
    names = [*special, *characters, *(f"##{c}" for c in characters)]
    model = hf.models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    backend = hf.Tokenizer(model)
    backend.normalizer = hf.normalizers.BertNormalizer()
    backend.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(special)
    return backend
