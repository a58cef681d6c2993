"""The analytic prior of a latency: what peak rates allow, operator by operator.

It fills what a latency table has not measured yet, and shows entries that no processor should need
so long for. `CalibratedPrior` corrects it by what has been measured.
"""

from __future__ import annotations

from hw_profiles.roofline.calibrated_prior import CalibratedPrior, left_out_errors
from hw_profiles.roofline.measured_peaks import measure_peaks
from hw_profiles.roofline.operator_work import Operator, Work, work
from hw_profiles.roofline.peaks import Peaks, peaks_differ
from hw_profiles.roofline.prior import Roofline
from hw_profiles.roofline.suspicion import suspicious

__all__ = [
    "CalibratedPrior",
    "Operator",
    "Peaks",
    "Roofline",
    "Work",
    "left_out_errors",
    "measure_peaks",
    "peaks_differ",
    "suspicious",
    "work",
]
