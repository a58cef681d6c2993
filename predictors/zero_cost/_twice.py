"""Running a network so that the gradient of its gradient exists.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nas_kernels.dispatch import reference_only
from nas_kernels.linear_scan import chunked as linear_scan
from nas_kernels.linear_scan import recurrent_linear_scan
from nas_kernels.selective_scan import chunked as selective_scan
from nas_kernels.selective_scan import recurrent_selective_scan
from searchspace.errors import UserError


def _scan(decay_BTC: Tensor, input_BTC: Tensor, state_BC: Tensor) -> Tensor:
    return recurrent_linear_scan(decay_BTC, input_BTC, state_BC)[0]


DEFINITIONS: dict[type[torch.autograd.Function], Callable[..., Any]] = {
    linear_scan._Scan: _scan,
    selective_scan._SelectiveScan: recurrent_selective_scan,
}
"""Operations whose gradient is written by hand, and what they compute token by token."""


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Take the slow way wherever the fast one has no second derivative.

    Fused attention has none, nor have kernels, nor the recurrences with a gradient written by hand:
    inside, scores are computed in full and these run from their definitions. Not for several
    threads.

    Differentiate by `Tensor.backward`: `torch.autograd.grad` skips the node that PyTorch puts in
    the place of a missing second derivative, and silently leaves out what would come through it.

    Raises:
        UserError: when an operation without a second derivative is left.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(reference_only())
        for operation, definition in DEFINITIONS.items():
            # Covers the inherited one until it is deleted.
            operation.apply = staticmethod(definition)  # type: ignore[method-assign]
            stack.callback(delattr, operation, "apply")
        try:
            yield
        except RuntimeError as error:
            if "once_differentiable" not in str(error) and "is not implemented" not in str(error):
                raise
            raise UserError(f"an operation's gradient has no gradient itself ({error})") from None
