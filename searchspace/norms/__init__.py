"""Normalisations. To add one: a file here with a `Norm` subclass, and a line in `NORMS`."""

from searchspace.norms.affine import Affine
from searchspace.norms.base import BatchStatisticNorm, Norm
from searchspace.norms.calibration import recalibrated
from searchspace.norms.crmsnorm import CRMSNorm
from searchspace.norms.layernorm import LayerNorm, LayerNormE12
from searchspace.norms.prepbn import PRepBN
from searchspace.norms.rmsnorm import RMSNorm, RMSNormE6
from searchspace.norms.unified_norm import UnifiedNorm

NORMS: dict[str, type[Norm]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "rmsnorm_e6": RMSNormE6,
    "layernorm_e12": LayerNormE12,
    "crmsnorm": CRMSNorm,
    "prepbn": PRepBN,
    "unified_norm": UnifiedNorm,
}
"""Every normalisation by name."""
OF_CHECKPOINTS = ("rmsnorm_e6", "layernorm_e12")
"""Those that only networks from elsewhere need: another number under the root is no choice."""

__all__ = [
    "NORMS",
    "OF_CHECKPOINTS",
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
