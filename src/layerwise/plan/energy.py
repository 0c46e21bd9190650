"""What a matrix keeps of its squared length, and what it costs to lose it: the scores behind magnitude pruning.

Let ``w_(1) >= w_(2) >= ...`` be the magnitudes of one matrix and let the smallest go first. Then

    kind=magnitude   cost of a set = sum of its w^2 = ||W' - W||^2      the next one costs w_(j)^2
    kind=lamp        cost of a set = -log(kept / whole)               the next one costs -log(1 - Imp_j),
                     kept = ||W'||^2,  whole = ||W||^2          Imp_j = w_(j)^2 / sum_{i<=j} w_(i)^2

``Imp`` is LAMP's score (DIMAP's too). Both costs of a next entry grow within a matrix, so the least sum of costs over
many matrices at one number of kept entries is what one threshold over all of them keeps: a global ranking *is* the
integer program that the planner solves, and so it works with candidates in any steps and of any widths. For a
candidate that rounds, ``kept`` is ``whole - ||W' - W||^2``: the part of the matrix that is still explained.
"""

from __future__ import annotations

import math

from layerwise.plan.measures import Measures
from layerwise.plan.order import Scores

KINDS = ("lamp", "magnitude")
LEAST = 1e-9  # share of the squared length that counts as kept where nothing is


def energy_costs(measures: Measures, kind: str) -> Scores:
    """Site -> recipe -> cost of what the candidate loses."""
    return {
        site: {recipe: _cost(lost, whole, kind) for recipe, (lost, whole) in found.items()}
        for site, found in measures.energies().items()
    }


def _cost(lost: float, whole: float, kind: str) -> float:
    if kind == "magnitude":
        return lost
    return -math.log(max(LEAST, 1 - lost / whole)) if whole > 0 else 0.0
