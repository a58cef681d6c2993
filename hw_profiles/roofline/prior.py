"""`Roofline`: work and peak rates make time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hw_profiles.roofline.operator_work import Operator, Work
from hw_profiles.roofline.peaks import FP32, Peaks


@dataclass(frozen=True)
class Roofline:
    """Turns work into time on one device.

    Args:
        peaks: its measured rates.
    """

    peaks: Peaks

    def prior_us(self, done: Work) -> float:
        """Return the least time in microseconds that the work takes when operators run in turn.

        Each operator takes a fixed time, and as long as its arithmetic or its memory traffic,
        whichever is slower. A precision whose rate was not measured counts as fp32.

        Source: Williams et al. 2009, "Roofline", section 3; Pope et al. 2022, "Efficiently Scaling
        Transformer Inference", section 2.
        """
        operators = sum(count * self._operator_us(operator) for operator, count in done.operators)
        return operators + done.num_views * self.peaks.view_us

    def _operator_us(self, operator: Operator) -> float:
        gflops = self.peaks.gflops
        compute_us = operator.flops / gflops.get(operator.precision, gflops[FP32]) / 1e3
        memory_us = operator.bytes_moved / self.peaks.bytes_per_us(operator.bytes_moved)
        return max(compute_us, memory_us) + self.peaks.op_us

    def rates_share(self, done: Work) -> float:
        """Return which share of the prior is arithmetic and memory traffic, not fixed cost."""
        fixed_us = done.num_ops * self.peaks.op_us + done.num_views * self.peaks.view_us
        return 1.0 - fixed_us / self.prior_us(done)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return self.peaks.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofline:
        """Build from `to_dict`'s form.

        Raises:
            UserError: for a missing or unknown field, or a rate that is no number above 0.
        """
        return cls(Peaks.from_dict(values))
