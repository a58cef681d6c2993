"""What can be searched: archs, spaces, operators, plain subnetworks and the supernet."""

from searchspace.arch import Arch, LayerArch
from searchspace.errors import UserError

__all__ = ["Arch", "LayerArch", "UserError"]
