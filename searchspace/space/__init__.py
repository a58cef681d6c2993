"""Search spaces: their choices, files, genotypes, random draws and sizes."""

from searchspace.space.canonical import Genotypes
from searchspace.space.files import PRESETS, read_space
from searchspace.space.search_space import SearchSpace

__all__ = ["PRESETS", "Genotypes", "SearchSpace", "read_space"]
