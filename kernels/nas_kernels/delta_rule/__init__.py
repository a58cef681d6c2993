"""Linear attention whose state is corrected by the delta rule."""

from nas_kernels.delta_rule.chunked import delta_rule
from nas_kernels.delta_rule.ref import recurrent_delta_rule

__all__ = ["delta_rule", "recurrent_delta_rule"]
