"""Translations of PyTorch's operators, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Handler = Callable[..., Any]
"""Takes the `Builder`, the result PyTorch computed (of which only shape and dtype count), and the
operator's arguments with a `Value` in the place of each tensor. Returns the result's `Value`, or a
list of them where PyTorch returns several; further ones may be left out.
"""


class Table(dict[str, Handler]):
    """Handlers by the operators' full names, such as ``"aten.add.Tensor"``."""

    def translates(self, *names: str) -> Callable[[Handler], Handler]:
        """Enter a function as the translation of operators."""

        def enter(handler: Handler) -> Handler:
            self.update(dict.fromkeys(names, handler))
            return handler

        return enter
