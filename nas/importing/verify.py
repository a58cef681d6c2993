"""Whether a network that was brought in computes what transformers computes from the same folder.

Shapes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.importing.checkpoint import BERT, Checkpoint
from searchspace.errors import UserError
from searchspace.subnet import Subnet

MAX_DIFFERENCE = 1e-5
SHAPES = ((1, 1), (2, 17), (1, 64))


def difference_from_transformers(checkpoint: Checkpoint, network: Subnet) -> float | None:
    """Return the largest difference of logits in fp32, relative to the largest logit.

    Args:
        checkpoint: transformers reads its folder, without running anything that lies in it.
        network: reads what ours are given; of BERT, without the first token.

    Returns:
        None where transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    model = _original(checkpoint)
    generator = torch.Generator().manual_seed(0)
    longest = checkpoint.recipe.family.max_tokens
    worst = 0.0
    for batch, tokens in SHAPES:
        shape = (batch, min(tokens, longest - 1))
        inputs = torch.randint(checkpoint.recipe.vocab_size, shape, generator=generator)
        theirs, ours = _logits(checkpoint, model, network, inputs)
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def require_equal(checkpoint: Checkpoint, network: Subnet) -> float | None:
    """Return `difference_from_transformers`, or refuse a network that differs.

    Raises:
        UserError: when it differs by more than `MAX_DIFFERENCE`.
    """
    found = difference_from_transformers(checkpoint, network)
    if found is not None and not found <= MAX_DIFFERENCE:
        raise UserError(
            f"the logits of {checkpoint.folder} differ by {found:.1e} of the largest from those of "
            f"transformers, allowed is {MAX_DIFFERENCE:.0e}; nothing was written"
        )
    return found


def _original(checkpoint: Checkpoint) -> Any:
    import transformers

    kind = getattr(transformers, checkpoint.recipe.architecture)
    folder = Path(checkpoint.folder).resolve()
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    model = kind.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _logits(
    checkpoint: Checkpoint, model: Any, network: Subnet, inputs_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits of transformers' model and ours."""
    if checkpoint.recipe.architecture != BERT:
        return model(inputs_BT).logits.float(), network(inputs_BT).float()
    pad, first = checkpoint.recipe.family.pad_token, checkpoint.cls_token
    inputs_BT = torch.where(inputs_BT == pad, (pad + 1) % checkpoint.recipe.vocab_size, inputs_BT)
    inputs_BT[-1, inputs_BT.shape[1] // 2 + 1 :] = pad
    whole = torch.cat([torch.full_like(inputs_BT[:, :1], first), inputs_BT], dim=1)
    there = torch.cat([torch.ones_like(whole[:, :1]), (inputs_BT != pad).long()], dim=1)
    return model(whole, attention_mask=there).logits.float(), network(inputs_BT).float()
