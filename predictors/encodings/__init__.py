"""Features of archs and of parameter dictionaries, for predictors."""

from predictors.encodings.archs import ENCODINGS, encode_archs
from predictors.encodings.features import Features, join, with_metrics
from predictors.encodings.genes import Gene, layer_groups, levels_of, params_of
from predictors.encodings.lazy import LazyFeatures
from predictors.encodings.prior_scaled import GeneEncoding

__all__ = [
    "ENCODINGS",
    "Features",
    "Gene",
    "GeneEncoding",
    "LazyFeatures",
    "encode_archs",
    "join",
    "layer_groups",
    "levels_of",
    "params_of",
    "with_metrics",
]
