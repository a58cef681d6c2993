"""Tensors inside what operators take and return."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
