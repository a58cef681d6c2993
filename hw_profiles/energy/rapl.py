"""Energy counters of processors: RAPL, as Linux shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
ZONES = "intel-rapl:*"
PACKAGE = "package-"
MJ_PER_UJ = 1e-3


@dataclass(frozen=True)
class RaplMeter:
    """The counter of one processor package: cores, caches and memory controller.

    Args:
        name: such as ``"RAPL package-0"``.
        zone: the folder with the counter.
        wraps_at_mj: where the counter starts again from 0.

    Source: Linux documentation, power/powercap/powercap; Intel Software Developer's Manual,
    volume 3B, section 15.10 (AMD's processors appear under the same names).
    """

    name: str
    zone: Path
    wraps_at_mj: float
    kind: str = "cpu"

    def read_mj(self) -> float:
        """Return the counter in millijoule."""
        return int((self.zone / "energy_uj").read_text()) * MJ_PER_UJ


def rapl_meters(powercap: Path = POWERCAP) -> tuple[list[RaplMeter], list[str]]:
    """Return the meters of all packages that can be read, and why others cannot.

    Parts of packages (cores, memory) are left out, they are counted in the package; so is the
    whole platform, which counts packages again.
    """
    meters, reasons = [], []
    zones = [zone for zone in sorted(powercap.glob(ZONES)) if zone.name.count(":") == 1]
    for zone in zones:
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(PACKAGE):
                continue
            wraps_at_mj = int((zone / "max_energy_range_uj").read_text()) * MJ_PER_UJ
            meter = RaplMeter(f"RAPL {name}", zone, wraps_at_mj)
            meter.read_mj()
        except PermissionError:
            reasons.append(
                f"the energy counter {zone / 'energy_uj'} may be read by the system administrator "
                "only: run as root, or allow reading it"
            )
        except (OSError, ValueError) as error:
            reasons.append(f"the energy counter of {zone.name} cannot be read ({error})")
        else:
            meters.append(meter)
    if not meters and not reasons:
        reasons.append("the system shows no energy counter of the processor (RAPL)")
    return meters, reasons
