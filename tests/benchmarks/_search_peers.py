"""Earlier figures on the public surrogates, to stand beside: medians of 5 seeds.

NSGA-II is pymoo's (population 50, SBX and polynomial mutation on integers), alone and started from
50 structured networks; LINAS a faithful copy; the prototype is what ours grew from.
"""

from __future__ import annotations

from typing import Any

_NSGA2, _DESIGN = "earlier: NSGA-II", "earlier: NSGA-II from 50 structured"
_LINAS, _PROTOTYPE = "earlier: LINAS", "earlier: prototype"
_COLUMNS = ("hv50", "hv100", "hv200", "e95", "e98", "e99")
_FIGURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "s pp": {
        _NSGA2: (0.892, 0.903, None, 537, 2260, ">20000"),
        _DESIGN: (None, None, None, 30, 282, 2214),
        _LINAS: (0.892, 0.905, None, 113, 359, 804),
        _PROTOTYPE: (0.980, 0.989, 0.994, 19, 49, 108),
    },
    "m pp": {
        _NSGA2: (0.863, 0.874, None, 1947, ">1000", ">1000"),
        _DESIGN: (None, None, None, 21, 311, 3665),
        _LINAS: (0.863, 0.869, None, 460, ">1000", ">1000"),
        _PROTOTYPE: (0.981, 0.989, 0.993, 15, 49, 112),
    },
    "s pm": {
        _NSGA2: (0.828, 0.846, None, 1778, ">1000", ">1000"),
        _LINAS: (0.828, 0.846, None, 306, 955, ">1000"),
        _PROTOTYPE: (0.972, 0.986, 0.993, 29, 70, 144),
    },
    "m pm": {
        _NSGA2: (0.820, 0.824, None, ">1000", ">1000", ">1000"),
        _LINAS: (0.822, 0.827, None, ">1000", ">1000", ">1000"),
        _PROTOTYPE: (0.977, 0.987, 0.992, 26, 63, 146),
    },
}


def earlier_rows(problem: str) -> list[dict[str, Any]]:
    """Return table rows of a problem's earlier figures; none for other problems."""
    return [
        {"problem": problem, "sampler": name, **dict(zip(_COLUMNS, values, strict=True))}
        for name, values in _FIGURES.get(problem, {}).items()
    ]
