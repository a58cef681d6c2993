"""The final front: chosen from the search, measured again, and compared with baselines.

Every group (front, random archs, uniform networks) inherits its weights from the same
supernet and is measured in the same interleaved session.
"""

from nas.front.files import write_front
from nas.front.measuring import measure_front
from nas.front.selection import select_front, uniform_networks
from nas.front.sources import FrontSources

__all__ = ["FrontSources", "measure_front", "select_front", "uniform_networks", "write_front"]
