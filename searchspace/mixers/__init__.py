"""Token mixers. To add one: a file here with a `Mixer` subclass, and a line in `MIXERS`."""

from searchspace.mixers.base import Mixer
from searchspace.mixers.gla import GatedLinearAttention
from searchspace.mixers.linear_elu import LinearAttention
from searchspace.mixers.sliding_window import SlidingWindowAttention
from searchspace.mixers.softmax import SoftmaxAttention

MIXERS: dict[str, type[Mixer]] = {
    "softmax": SoftmaxAttention,
    "sliding_window": SlidingWindowAttention,
    "linear_elu": LinearAttention,
    "gla": GatedLinearAttention,
}
"""Every mixer by name; `"none"` stands for a slot without one."""

__all__ = ["MIXERS", "Mixer"]
