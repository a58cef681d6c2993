"""Exact running statistics for one network, taken after training.

Shapes: D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from searchspace.norms.base import BatchStatisticNorm


@contextmanager
def recalibrated(module: nn.Module) -> Iterator[None]:
    """Replace running statistics by exact ones over the forward passes made inside.

    The shared statistics of a supernet are a mixture over all its networks and fit none of them.
    Inside, every norm uses the statistics of its own batch, as in training, without gradients; at
    the end the averages go into the buffers, in place. After an error, and in norms that no pass
    reached, the buffers stay as they were. Modules without such norms are left alone.

    Use it on an extracted network: on a view it would change what all networks share. ::

        with recalibrated(subnet):
            for inputs in batches:
                subnet(inputs)

    Args:
        module: a subnetwork, or any part of one.

    Source: Yu and Huang 2019, "Universally Slimmable Networks", section 3.2 (post-statistics, exact
    averages instead of moving ones); used by Cai et al. 2020, "Once-for-All", before validation.
    """
    norms = [child for child in module.modules() if isinstance(child, BatchStatisticNorm)]
    for norm in norms:
        norm.start_calibration()
    try:
        with torch.no_grad():
            yield
            for norm in norms:
                norm.finish_calibration()
    finally:
        for norm in norms:
            norm.cancel_calibration()


@dataclass
class Moments:
    """Mean and sum of squared deviations of all values added so far.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", equation
    2.1; it stays exact where the difference of two large sums would not.
    """

    count: int = 0
    mean_D: Tensor | None = None
    deviations_D: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add `x` (..., D)."""
        rows = x.detach().flatten(0, -2)
        count, mean_D = rows.shape[0], rows.mean(dim=0)
        deviations_D = (rows - mean_D).square().sum(dim=0)
        if self.mean_D is None or self.deviations_D is None:
            self.count, self.mean_D, self.deviations_D = count, mean_D, deviations_D
            return
        total, step_D = self.count + count, mean_D - self.mean_D
        self.deviations_D += deviations_D + step_D.square() * (self.count * count / total)
        self.mean_D += step_D * (count / total)
        self.count = total
