"""Budgeted assignment: the best block for every layer under hard limits, by integer programming.

Scores of single blocks are taken once per supernet; every budget is then a matter of seconds.
"""

from __future__ import annotations

from nas.assignment.assign import Assigned, Assignment, assign, front, reasons, sweep
from nas.assignment.diagnosis import Diagnosis, diagnose
from nas.assignment.problem import AssignmentProblem, Coupling, Curve, Limit, Slot
from nas.assignment.solve import Solution, solve

__all__ = [
    "Assigned",
    "Assignment",
    "AssignmentProblem",
    "Coupling",
    "Curve",
    "Diagnosis",
    "Limit",
    "Slot",
    "Solution",
    "assign",
    "diagnose",
    "front",
    "reasons",
    "solve",
    "sweep",
]
