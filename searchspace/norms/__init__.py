"""Normalisations. To add one: a file here with a `Norm` subclass, and a line in `NORMS`."""

from searchspace.norms.affine import Affine
from searchspace.norms.base import BatchStatisticNorm, Norm
from searchspace.norms.calibration import recalibrated
from searchspace.norms.crmsnorm import CRMSNorm
from searchspace.norms.layernorm import LayerNorm
from searchspace.norms.prepbn import PRepBN
from searchspace.norms.rmsnorm import RMSNorm
from searchspace.norms.unified_norm import UnifiedNorm

NORMS: dict[str, type[Norm]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "crmsnorm": CRMSNorm,
    "prepbn": PRepBN,
    "unified_norm": UnifiedNorm,
}
"""Every normalisation by name."""

__all__ = [
    "NORMS",
    "Affine",
    "BatchStatisticNorm",
    "CRMSNorm",
    "LayerNorm",
    "Norm",
    "PRepBN",
    "RMSNorm",
    "UnifiedNorm",
    "recalibrated",
]
